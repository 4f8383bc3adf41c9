"""`vllm serve` with a backend whose device fails on demand: a fault ends its own request and nothing else."""

import base64
import io
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import InternalServerError, OpenAI

from digits_vlm.samples import held_out_images
from fake_plugins import install
from visionaccel.core.cores import process_cores, shown_cores
from visionaccel_bench.server import metric, metrics_of, serve

FLAKY = '''
import os
from pathlib import Path
from visionaccel.backends import Session, hookimpl
from visionaccel_onnxrt.backend import OnnxRuntimeBackend

class Switched(Session):
    """A session that obeys a file: for the named number of patches, or for all, it raises or answers NaN."""
    def __init__(self, session):
        self.session = session
    @property
    def capabilities(self):
        return self.session.capabilities
    def run(self, inputs):
        action, _, which = Path(os.environ["FLAKY_SWITCH"]).read_text().partition(" ")
        outputs = self.session.run(inputs)
        if action != "off" and which in ("all", str(len(inputs["pixel_values"]))):
            if action == "raise":
                raise OSError("DRM_IOCTL failed")
            outputs["embeddings"][:] = float("nan")
        return outputs
    def close(self):
        self.session.close()

class Flaky(OnnxRuntimeBackend):
    name = "flaky"
    def open(self, program, device, options):
        before = set(os.listdir("/proc/self/task"))
        session = super().open(program, device, options)
        new = (Path("/proc/self/task", thread, "status") for thread in set(os.listdir("/proc/self/task")) - before)
        lines = [line for file in new for line in file.read_text().splitlines() if line.startswith("Cpus_allowed_list")]
        print(f"flaky computes on {sorted(os.sched_getaffinity(0))}, and its pool on", *lines, flush=True)
        return Switched(session)

@hookimpl
def visionaccel_backends():
    return [Flaky]
'''
SINGLES = held_out_images(6)
VLLM_SERVE = (str(Path(sys.executable).with_name("vllm")), "serve")
ARGUMENTS = ("--enforce-eager", "--max-model-len", "4096", "--max-num-seqs", "16")


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    """The file that the flaky backend obeys."""
    file = tmp_path_factory.mktemp("switch") / "switch"
    file.write_text("off")
    return file


@pytest.fixture(
    scope="module",
    params=[("none", "bfloat16", "inline", "1"), ("torch_ref", "float32", "pipelined", "2")],
    ids="-".join,
)
def flaky(request, digits, switch, tmp_path_factory):
    """A server on the flaky backend, with and without a fallback, in two modes, of one and of two API servers; and
    whether it has a fallback. It makes no file of visionaccel's, so that it leaves none when it is killed.
    """
    temporary = tmp_path_factory.mktemp("temporary")
    fallback, dtype, mode, servers = request.param
    site = install(tmp_path_factory.mktemp("site"), "acme-flaky", "flaky", FLAKY)
    settings = {
        "VISIONACCEL_BACKEND": "flaky",
        "VISIONACCEL_FALLBACK": fallback,
        "VISIONACCEL_MODE": mode,
        "FLAKY_SWITCH": str(switch),
        "PYTHONPATH": str(site),
        "TMPDIR": str(temporary),
    }
    switch.write_text("off")
    with serve(
        digits, settings, ("--dtype", dtype, "--api-server-count", servers, *ARGUMENTS), command=VLLM_SERVE
    ) as server:
        yield server, fallback != "none"
        os.kill(server.child.pid, signal.SIGKILL)  # alone, without the processes of its engine
        assert server.child.exits_within(30)
        assert list(temporary.glob("visionaccel*")) == []


@pytest.fixture
def client(flaky):
    with OpenAI(base_url=flaky[0].url, api_key="none", max_retries=0) as client:
        yield client


def read(client, sample, **extra):
    png = io.BytesIO()
    sample.image.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Read the digits."}]
    return client.chat.completions.create(
        model="visionaccel", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=8, **extra
    )


def text(client, sample):
    return read(client, sample).choices[0].message.content


def patches(sample):
    """Patches of an image as the processor makes them: sides rounded to multiples of 28 pixels."""
    return round(sample.image.height / 28) * round(sample.image.width / 28) * 4


@pytest.mark.parametrize("action", ["raise", "nan"])
def test_a_fault_ends_its_own_request_alone(flaky, client, switch, stock, action):
    server, has_fallback = flaky
    expected = [answer["text"] for answer in stock["parts"]["first"]]
    # Fresh images for each action, so that neither vLLM's caches nor an earlier fault decide the outcome.
    first = 0 if action == "raise" else 3
    victim, *neighbours = range(first, first + 3)
    assert len({patches(SINGLES[i]) for i in range(6)}) == 6

    switch.write_text(f"{action} {patches(SINGLES[victim])}")
    with ThreadPoolExecutor(3) as pool:
        asked = {i: pool.submit(text, client, SINGLES[i]) for i in (victim, *neighbours)}
    assert [asked[i].result() for i in neighbours] == [expected[i] for i in neighbours]
    if has_fallback:
        assert asked[victim].result() == expected[victim]
        assert "using fallback" in server.log.read_text()
    else:
        with pytest.raises(InternalServerError, match="of the prompt could not be encoded: backend 'flaky'"):
            asked[victim].result()
        assert "ends with an error: backend 'flaky'" in server.log.read_text()
        # Again, streamed: not one token of a wrong answer may come before the error.
        with pytest.raises(Exception, match="could not be encoded"):  # noqa: PT012
            for chunk in read(client, SINGLES[victim], stream=True):
                assert not any(choice.delta.content for choice in chunk.choices)
    assert server.healthy()

    switch.write_text("off")
    assert [text(client, SINGLES[i]) for i in (victim, *neighbours)] == [expected[i] for i in (victim, *neighbours)]


def test_text_alone_is_served_while_the_device_is_down(client, switch):
    switch.write_text("raise all")
    messages = [{"role": "user", "content": "Read the digits."}]
    reply = client.chat.completions.create(model="visionaccel", messages=messages, temperature=0, max_tokens=4)
    assert reply.usage.completion_tokens > 0
    switch.write_text("off")


def test_the_encoders_threads_are_not_bound_to_a_core_of_the_language_models(flaky):
    log, allowed = flaky[0].log.read_text(), sorted(process_cores())
    assert f"The encoder's threads run on cores {shown_cores(allowed)} of the CPU: " in log
    assert set(re.findall(r"flaky computes on (.*), and its pool on Cpus_allowed_list:\t(.*)", log)) == {
        (str(allowed), shown_cores(allowed))
    }


def test_a_truncated_image_is_refused_before_the_engine(flaky, client):
    from openai import BadRequestError

    png = io.BytesIO()
    SINGLES[0].image.save(png, "PNG")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()[:300]).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Read the digits."}]
    with pytest.raises(BadRequestError):
        client.chat.completions.create(model="visionaccel", messages=[{"role": "user", "content": content}])
    assert flaky[0].healthy()


def test_every_api_server_shows_the_metrics_of_all_processes(flaky, client):
    server, has_fallback = flaky
    text(client, held_out_images(20)[-1])
    time.sleep(1.5)
    several = [metrics_of(server.url) for _ in range(6)]
    encoded = {metric(each, "visionaccel_encode_seconds_count", backend="flaky", purpose="request") for each in several}
    assert len(encoded) == 1, "whichever answers"
    assert encoded.pop() >= 1
    assert metric(several[0], "visionaccel_processor_seconds_count") >= 1
    assert (metric(several[0], "visionaccel_fallback_items_total") > 0) == has_fallback
    assert all(each.count("# HELP visionaccel_encode_seconds ") == 1 for each in several)
