"""The router of the disaggregated example, in front of instances that are functions."""

import asyncio
import importlib.util
import json
from collections import Counter
from pathlib import Path

import httpx
import pytest

ROUTER = Path(__file__).parents[2] / "examples" / "disaggregated" / "router.py"
ENCODERS = ["http://e1", "http://e2", "http://e3"]
LANGUAGE_MODELS = ["http://l1", "http://l2"]
CAT = {"type": "image_url", "image_url": {"url": "data:image/png;base64,cat"}}
DOG = {"type": "image_url", "image_url": {"url": "data:image/png;base64,dog"}}
CLIP = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,clip"}}
TEXT = {"type": "text", "text": "What is it?"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def make_app():
    spec = importlib.util.spec_from_file_location("disaggregated_router", ROUTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_app


class Instances:
    """Records what each is asked. An answer is a status, a JSON object, an exception to raise or a coroutine."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    async def __call__(self, request):
        host = request.url.host
        body = json.loads(request.content) if request.content else None
        self.asked.append((host, request.url.path, body, request.headers))
        answer = self.answers.get(host, {"ec_transfer_params": None} if host.startswith("e") else {"from": host})
        if callable(answer):
            answer = await answer()
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx.Response(answer, json={"error": {"message": f"{host} says {answer}"}})
        return httpx.Response(200, json=answer)

    @property
    def hosts(self):
        return [host for host, *_ in self.asked]


@pytest.fixture
def ask(make_app):
    """Send bodies to a router one after another; returns the answers."""

    def run(instances, *bodies, headers=None, path=CHAT, affinity=False):
        async def send():
            app = make_app(ENCODERS, LANGUAGE_MODELS, affinity=affinity, transport=httpx.MockTransport(instances))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://router") as client:
                if path != CHAT:
                    return [await client.get(path, headers=headers)]
                contents = [json.dumps(body) if isinstance(body, dict) else body for body in bodies]
                return [await client.post(path, headers=headers, content=content) for content in contents]

        answers = asyncio.run(send())
        return answers[0] if len(answers) == 1 else answers

    return run


def chat(*parts, **extra):
    return {"model": "m", "messages": [{"role": "user", "content": list(parts)}], "temperature": 0, **extra}


def test_items_are_encoded_one_by_one_before_the_unchanged_request_is_answered(ask):
    instances = Instances()
    body = chat(CAT, CLIP, TEXT, max_tokens=8, stream=True, mm_processor_kwargs={"max_pixels": 9})
    answer = ask(instances, body, headers={"authorization": "Bearer key", "x-request-id": "7"})
    assert answer.json() == {"from": "l1"}
    *encoded, (host, _, forwarded, headers) = instances.asked
    assert (host, forwarded) == ("l1", body)
    assert headers["authorization"] == "Bearer key"
    assert headers["x-request-id"] == "7"
    for item, (host, path, asked, headers) in zip((CAT, CLIP), encoded, strict=True):
        assert host.startswith("e")
        assert path == CHAT
        assert asked == {
            "model": "m",
            "messages": [{"role": "user", "content": [item]}],
            "max_tokens": 1,
            "stream": False,
            "mm_processor_kwargs": {"max_pixels": 9},
        }
        assert headers["authorization"] == "Bearer key"
    assert len({headers["x-request-id"] for *_, headers in instances.asked}) == 3


def test_a_repeated_image_is_encoded_once(ask):
    instances = Instances()
    assert ask(instances, chat(CAT, DOG, CAT, TEXT)).status_code == 200
    assert len(instances.hosts) == 3


@pytest.mark.parametrize("content", ["What is it?", [TEXT], ["What is it?"], None])
def test_text_goes_straight_on(ask, content):
    instances = Instances()
    assert ask(instances, {"messages": [{"role": "user", "content": content}]}).status_code == 200
    assert instances.hosts == ["l1"]


def test_instances_take_turns(ask):
    instances = Instances()
    ask(instances, *[chat(CAT)] * 6)
    assert instances.hosts == ["e1", "l1", "e2", "l2", "e3", "l1", "e1", "l2", "e2", "l1", "e3", "l2"]


def test_with_affinity_an_image_always_goes_to_the_same_encoder(ask):
    instances = Instances()
    images = [{"type": "image_url", "image_url": {"url": f"data:,{i}"}} for i in range(30)]
    ask(instances, *[chat(image) for image in images * 2], affinity=True)
    encoders = [host for host in instances.hosts if host.startswith("e")]
    assert encoders[:30] == encoders[30:]
    assert min(Counter(encoders).values()) >= 8


def test_an_encoders_error_is_the_requests(ask):
    instances = Instances(e1=500)
    failed, fine = ask(instances, chat(TEXT, CAT), chat(TEXT, DOG))
    assert failed.status_code == 500
    assert failed.json()["error"]["message"] == "image 1 of 1 could not be encoded: e1 says 500"
    assert fine.status_code == 200
    assert instances.hosts == ["e1", "e2", "l1"]


def test_one_failed_item_ends_the_work_on_its_neighbours(ask):
    ended = []

    async def slow():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(True)
            raise

    assert ask(Instances(e1=slow, e2=400), chat(CAT, DOG)).status_code == 400
    assert ended == [True]


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.ConnectTimeout("no answer"), 502, 503, 504])
def test_an_unreachable_encoder_is_skipped_and_then_left_alone(ask, failure):
    instances = Instances(e1=failure)
    answers = ask(instances, *[chat(CAT)] * 4)
    assert [answer.status_code for answer in answers] == [200] * 4
    assert instances.hosts.count("e1") == 1


def test_no_reachable_encoder_is_a_503_for_requests_with_images_only(ask):
    refused = httpx.ConnectError("refused")
    failed, fine = ask(Instances(e1=refused, e2=refused, e3=503), chat(CAT), chat(TEXT))
    assert failed.status_code == 503
    assert "no encoder instance can be reached" in failed.json()["error"]["message"]
    assert fine.status_code == 200


def test_an_image_that_ends_encoders_is_not_given_to_all_of_them(ask):
    broken = httpx.ReadError("connection reset")
    instances = Instances(e1=broken, e2=broken)
    answer = ask(instances, chat(CAT))
    assert answer.status_code == 502
    assert "broke off" in answer.json()["error"]["message"]
    assert instances.hosts == ["e1", "e2"]


def test_an_encoder_that_breaks_off_is_replaced_once(ask):
    assert ask(Instances(e1=httpx.ReadError("connection reset")), chat(CAT)).status_code == 200


def test_language_models_errors_and_absence(ask):
    assert ask(Instances(l1=400), chat(TEXT)).json() == {"error": {"message": "l1 says 400"}}
    refused = httpx.ConnectError("refused")
    assert ask(Instances(l1=refused), chat(TEXT)).json() == {"from": "l2"}
    assert ask(Instances(l1=refused, l2=refused), chat(TEXT)).status_code == 503
    # What may already have been answered in part is not asked twice.
    assert ask(Instances(l1=httpx.ReadError("connection reset")), chat(TEXT)).status_code == 502


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "video_embeds", "video_embeds": "AAAA"},
        {"type": "audio_embeds", "audio_embeds": "AAAA"},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"image_embeds": "AAAA"},
        {"type": ["image_embeds"], "image_embeds": "AAAA"},
        {"type": "text", "text": "", "uuid": "x", "image_embeds": "AAAA"},
        {**CAT, "uuid": "../../etc"},
        {"type": "image_pil", "image_pil": "x"},
        ["image_embeds"],
        7,
    ],
    ids=str,
)
def test_embeddings_and_identifiers_of_clients_are_refused(ask, part):
    instances = Instances()
    answer = ask(instances, chat(CAT, part, TEXT))
    assert answer.status_code == 400
    assert "not accepted" in answer.json()["error"]["message"]
    assert instances.asked == []


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"{}",
        {"messages": {"content": []}},
        {"messages": [{"role": "user", "content": {"type": "image_embeds"}}]},
        chat(TEXT, ec_transfer_params={"x": {"peer_host": "elsewhere"}}),
        chat(TEXT, kv_transfer_params={"remote_host": "elsewhere"}),
    ],
    ids=str,
)
def test_other_requests_that_instances_should_not_see(ask, body):
    instances = Instances()
    assert ask(instances, body).status_code == 400
    assert instances.asked == []


def test_a_field_given_twice_is_read_by_the_instance_as_by_the_router(ask):
    instances = Instances()
    twice = b'{"messages": [{"content": [{"type": "image_embeds"}]}], "messages": [{"content": "hello"}]}'
    assert ask(instances, twice).status_code == 200
    assert instances.asked[0][2] == {"messages": [{"content": "hello"}]}


def test_the_place_of_embeddings_that_must_be_fetched_is_passed_on(ask):
    place = {"cat": {"peer_host": "10.0.0.1", "peer_port": 1, "item_indices": [0]}}
    instances = Instances(e1={"ec_transfer_params": place}, e2={"ec_transfer_params": {"dog": {"item_indices": [0]}}})
    ask(instances, chat(CAT, DOG))
    assert instances.asked[-1][2]["ec_transfer_params"] == place


def test_health_and_models(ask):
    answer = ask(Instances(e1=503, e2=httpx.ConnectError("refused")), path="/health")
    assert answer.status_code == 200
    assert answer.json() == {"encoders": {"healthy": 1, "of": 3}, "language_models": {"healthy": 2, "of": 2}}
    assert ask(Instances(l1=503, l2=503), path="/health").status_code == 503
    assert ask(Instances(l1=httpx.ConnectError("refused")), path="/v1/models").json() == {"from": "l2"}


@pytest.mark.parametrize("kind", ["e", "l"])
def test_a_client_that_goes_away_ends_what_runs_for_it(make_app, kind):
    started, ended = asyncio.Event(), asyncio.Event()

    async def slow():
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def scenario():
        instances = Instances(**{f"{kind}1": slow})
        app = make_app(ENCODERS, LANGUAGE_MODELS, transport=httpx.MockTransport(instances))
        messages = [{"type": "http.request", "body": json.dumps(chat(CAT)).encode(), "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await started.wait()
            return {"type": "http.disconnect"}

        async def send(_):
            pass

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": CHAT,
            "query_string": b"",
            "headers": [],
        }
        await asyncio.wait_for(app(scope, receive, send), 10)
        assert ended.is_set()
        return instances.hosts

    assert asyncio.run(scenario()) == (["e1"] if kind == "e" else ["e1", "l1"])
