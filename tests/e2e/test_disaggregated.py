"""The encoder and language-model instances of `examples/disaggregated` behind its router, on vLLM's own connector."""

import base64
import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import BadRequestError, InternalServerError, OpenAI
from safetensors.torch import load_file

from digits_vlm.samples import held_out_images
from fake_plugins import install
from forked import WORKER_IN_ENGINE, servers

START = Path(__file__).parents[2] / "examples" / "disaggregated" / "start.py"
WATCHED = '''
import os
from pathlib import Path
from visionaccel.backends import Session, hookimpl
from visionaccel_onnxrt.backend import OnnxRuntimeBackend

FOLDER, SIDE = Path(os.environ["WATCHED_FOLDER"]), os.environ.get("WATCHED_SIDE", "language_model")

def note(what):
    with (FOLDER / SIDE).open("a") as file:
        file.write(f"{what}\\n")

class WatchedSession(Session):
    """Notes the patches of each run; for the number in the file `switch` it raises or answers NaN."""
    def __init__(self, session):
        self.session = session
    @property
    def capabilities(self):
        return self.session.capabilities
    def run(self, inputs):
        patches = str(len(inputs["pixel_values"]))
        note(patches)
        action, _, which = (FOLDER / "switch").read_text().partition(" ")
        outputs = self.session.run(inputs)
        if which == patches:
            if action == "raise":
                raise OSError("DRM_IOCTL failed")
            outputs["embeddings"][:] = float("nan")
        return outputs
    def close(self):
        self.session.close()

class Watched(OnnxRuntimeBackend):
    name = "watched"
    def open(self, program, device, options):
        note("open")
        return WatchedSession(super().open(program, device, options))

@hookimpl
def visionaccel_backends():
    return [Watched]
'''
IMAGES = held_out_images(34)
ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The folder where the backend of each side notes what it does, and that holds its switch."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "switch").write_text("off")
    for side in ("encoder", "language_model"):
        (folder / side).touch()
    return folder


@pytest.fixture(scope="module")
def deployment(digits, watched, tmp_path_factory):
    spec = importlib.util.spec_from_file_location("disaggregated_start", START)
    start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start)
    site = install(tmp_path_factory.mktemp("site"), "acme-watched", "watched", WATCHED)
    settings = {
        "VISIONACCEL_BACKEND": "watched",
        "WATCHED_FOLDER": str(watched),
        "PYTHONPATH": str(site),
    } | WORKER_IN_ENGINE
    own = {"WATCHED_SIDE": "encoder"}
    with servers(), start.disaggregated(digits, settings, ARGUMENTS, encoder_settings=own) as running:
        yield running


@pytest.fixture
def client(deployment):
    with OpenAI(base_url=deployment.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def encoded(deployment, watched):
    """A function: the patches of each run of the encoder instance since the test began."""
    before = len((watched / "encoder").read_text().split())
    return lambda: (watched / "encoder").read_text().split()[before:]


@pytest.fixture(autouse=True)
def consumer_did_not_encode(deployment, watched):
    """Holds after every test: the language-model instance did not so much as open its encoder."""
    yield
    assert (watched / "language_model").read_text() == ""


def ask(client, *samples, **extra):
    content = [{"type": "text", "text": "Read the digits."}]
    for sample in reversed(samples):
        png = io.BytesIO()
        sample.image.save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return client.chat.completions.create(
        model="visionaccel", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=8, **extra
    )


def text(client, *samples):
    return ask(client, *samples).choices[0].message.content


def patches(sample):
    """Patches of an image as the processor makes them: sides rounded to multiples of 28 pixels."""
    return str(round(sample.image.height / 28) * round(sample.image.width / 28) * 4)


def published(deployment):
    """Every embedding in the shared folder."""
    return [load_file(file)["ec_cache"] for file in deployment.storage.rglob("*.safetensors")]


def test_answers_are_those_of_one_process(client, stock, encoded):
    alone = [answer["text"] for answer in stock["parts"]["first"]]
    pair = stock["parts"]["others"][0]["text"]
    with ThreadPoolExecutor(7) as pool:
        asked = [
            pool.submit(text, client, *samples) for samples in (*([sample] for sample in IMAGES[:6]), IMAGES[30:32])
        ]
    assert [answer.result() for answer in asked] == [*alone, pair]
    assert sorted(encoded()) == sorted(map(patches, [*IMAGES[:6], *IMAGES[30:32]]))


def test_text_alone_needs_no_encoder(client, stock, encoded):
    assert text(client) == stock["parts"]["others"][3]["text"]
    assert encoded() == []


def test_streamed(client, stock):
    chunks = list(ask(client, *IMAGES[32:34], stream=True))
    parts = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert "".join(parts) == stock["parts"]["others"][1]["text"]
    assert len(parts) > 1


def test_an_image_that_was_seen_is_not_encoded_again(client, encoded):
    answer = text(client, IMAGES[20])
    assert text(client, IMAGES[20]) == answer
    assert text(client, IMAGES[20], IMAGES[20])
    assert encoded() == [patches(IMAGES[20])]


def test_embeddings_of_a_client_are_refused(client, deployment):
    buffer = io.BytesIO()
    torch.save(torch.zeros(4, 64), buffer)
    part = {"type": "image_embeds", "image_embeds": base64.b64encode(buffer.getvalue()).decode()}
    with pytest.raises(BadRequestError, match="'image_embeds' is not accepted"):
        client.chat.completions.create(model="visionaccel", messages=[{"role": "user", "content": [part]}])


def test_a_truncated_image_is_the_clients_error(client):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    with pytest.raises(BadRequestError, match="image 1 of 1 could not be encoded"):
        client.chat.completions.create(model="visionaccel", messages=[{"role": "user", "content": [part]}])


@pytest.mark.parametrize(("action", "first"), [("raise", 7), ("nan", 10)])
def test_a_device_fault_ends_its_own_request_and_leaves_nothing(client, deployment, watched, action, first):
    victim, *neighbours = IMAGES[first : first + 3]
    assert len({patches(sample) for sample in (victim, *neighbours)}) == 3
    before = len(published(deployment))
    (watched / "switch").write_text(f"{action} {patches(victim)}")
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(text, client, sample) for sample in (victim, *neighbours)]
    (watched / "switch").write_text("off")
    with pytest.raises(InternalServerError, match="image 1 of 1 could not be encoded"):
        asked[0].result()
    answers = [answer.result() for answer in asked[1:]]
    embeddings = published(deployment)
    assert len(embeddings) == before + 2
    assert all(bool(embedding.any()) and bool(embedding.isfinite().all()) for embedding in embeddings)
    assert all(server.healthy() for server in (*deployment.encoders, *deployment.language_models))

    assert text(client, victim) == victim.truth
    assert [text(client, sample) for sample in neighbours] == answers
    assert len(published(deployment)) == before + 3
