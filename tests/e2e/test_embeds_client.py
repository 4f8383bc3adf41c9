"""The example of a client that sends its own embeddings to a vLLM in which visionaccel has no part."""

import base64
import importlib.util
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import forked
from bundles import write_bundle
from digits_vlm.samples import digits_video, held_out_images
from doc_pages import ROOT
from message_parts import picture
from visionaccel import open_service
from visionaccel.errors import InputError, UnsupportedArchitectureError
from visionaccel_bench.server import quiet_environment, serve
from whole_models import MODELS, write_model

EXAMPLE = ROOT / "examples" / "embeds_client" / "client.py"
QUESTION = "Read the digits."
TEXT = {"type": "text", "text": QUESTION}
FRAMES = digits_video(np.random.default_rng(7), "held_out", frames=6).frames
"""Those of `ask.py`'s video."""

ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--enable-mm-embeds")
SLOW = 0.5
"""Frames per second of a video whose times differ from those that vLLM assumes without them."""


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("embeds_client", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ask(client):
    """A function: the choice that a server answers parts with, as greedily as `ask.py`."""

    def asked(server, *parts):
        more = {"temperature": 0, "max_tokens": 8, "logprobs": True, "return_token_ids": True}
        reply = client.ask(server.url, [*parts, TEXT], **more)
        return {**reply["choices"][0], "prompt_token_ids": reply["prompt_token_ids"]}

    return asked


def logprobs(choice):
    return [token["logprob"] for token in choice["logprobs"]["content"]]


# Qwen2.5-VL, which the server loads without its tower.


@pytest.fixture(scope="module")
def towerless(digits):
    """The digits reader, served without its vision tower."""
    none = ("--limit-mm-per-prompt", '{"image": 0, "video": 0}')
    with forked.servers(), serve(digits, forked.WORKER_IN_ENGINE, (*ARGUMENTS, *none)) as server:
        yield server


@pytest.fixture(scope="module")
def reader_parts(client, digits):
    with open_service(digits, backend="onnxrt") as service:
        yield client.MessageParts(service)


def test_without_its_tower_vllm_answers_as_with_it(towerless, reader_parts, ask, stock):
    images = held_out_images(32)
    asked = [[image] for image in images[:6]] + [images[30:32]]
    expected = [*stock["parts"]["first"], stock["parts"]["others"][0]]
    for samples, theirs in zip(asked, expected, strict=True):
        ours = ask(towerless, *(reader_parts.image(sample.image) for sample in samples))
        assert ours["token_ids"] == theirs["tokens"]
        assert logprobs(ours) == pytest.approx(theirs["logprobs"], rel=0, abs=1e-4)


def test_a_video_has_its_rate(towerless, reader_parts, ask, stock):
    found = []
    for fps, part in ((2.0, "video"), (SLOW, "slow video")):
        ours, (theirs,) = ask(towerless, reader_parts.video(FRAMES, fps)), stock["parts"][part]
        assert ours["token_ids"] == theirs["tokens"]
        assert logprobs(ours) == pytest.approx(theirs["logprobs"], rel=0, abs=1e-5)
        found.append(logprobs(ours))
    assert found[0] != pytest.approx(found[1], rel=0, abs=1e-4), "the rate matters"


def test_vllm_loaded_no_tower_and_nothing_of_visionaccel(towerless):
    log = towerless.log.read_text()
    assert "enable_mm_embeds is True; modalities handled as embedding-only" in log
    assert "the vision encoder runs" not in log


def test_an_image_itself_is_refused_by_a_server_without_a_tower(towerless, client, ask):
    with pytest.raises(client.AnswerError, match=r"status 400: .*At most 0 image"):
        ask(towerless, picture(held_out_images(1)[0]))
    assert towerless.healthy()


def test_the_command_fits_images_to_a_bundle_and_needs_no_vllm(towerless, digits, tmp_path):
    write_bundle(digits, tmp_path / "bundle", "8x16", "12x22", split_host=True)
    (tmp_path / "vllm.py").write_text("raise ImportError('this machine has no vLLM')")
    sample = held_out_images(2)[1]
    sample.image.save(tmp_path / "page.png")
    command = [sys.executable, EXAMPLE, tmp_path / "bundle", QUESTION, tmp_path / "page.png"]
    environment = quiet_environment({"PYTHONPATH": str(tmp_path)})
    done = subprocess.run(
        [*command, "--url", towerless.url], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout.strip()) == (0, sample.truth), done.stderr


# Qwen3-VL, which needs its tower because of the deepstack levels.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(MODELS["Qwen3VLForConditionalGeneration"], tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def whole(model):
    """A tiny model with deepstack levels, served with its vision tower."""
    rate = ("--media-io-kwargs", json.dumps({"video": {"fps": SLOW}}))
    with forked.servers(), serve(model, forked.WORKER_IN_ENGINE, (*ARGUMENTS, *rate)) as server:
        yield server


@pytest.fixture(scope="module")
def parts(client, model):
    with open_service(model, backend="onnxrt") as service:
        yield client.MessageParts(service)


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1], [1, 1, 2]], ids=str)
def test_embeddings_with_deepstack_levels_are_answered_as_the_images_themselves(whole, parts, ask, chosen):
    samples = [held_out_images(3)[each] for each in chosen]
    ours = ask(whole, *(parts.image(sample.image) for sample in samples))
    theirs = ask(whole, *map(picture, samples))
    assert ours["prompt_token_ids"] == theirs["prompt_token_ids"]
    assert ours["token_ids"] == theirs["token_ids"]
    assert logprobs(ours) == pytest.approx(logprobs(theirs), rel=0, abs=1e-4)


def test_a_videos_timestamps_are_in_the_prompt(whole, parts, ask):
    jpegs = [io.BytesIO() for _ in range(6)]
    for frame, jpeg in zip(FRAMES, jpegs, strict=True):
        Image.fromarray(frame).save(jpeg, "JPEG")
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(jpeg.getvalue()).decode() for jpeg in jpegs)
    frames = np.stack([np.asarray(Image.open(jpeg)) for jpeg in jpegs])
    theirs = ask(whole, {"type": "video_url", "video_url": {"url": url}})
    ours, faster = ask(whole, parts.video(frames, SLOW)), ask(whole, parts.video(frames, 2.0))
    assert ours["prompt_token_ids"] == theirs["prompt_token_ids"] != faster["prompt_token_ids"]
    assert ours["token_ids"] == theirs["token_ids"]
    assert logprobs(ours) == pytest.approx(logprobs(theirs), rel=0, abs=1e-4)


def test_the_client_refuses_what_is_not_a_video(parts):
    for frames, fps in ((FRAMES[:5], 2.0), (FRAMES[:0], 2.0), (FRAMES, 0.0), (FRAMES, float("nan"))):
        with pytest.raises(InputError, match="are not a video for this model"):
            parts.video(frames, fps)


def test_the_client_refuses_videos_of_a_family_whose_times_it_does_not_know(parts, client, monkeypatch):
    monkeypatch.delitem(client.TIMES, "qwen3_vl")
    with pytest.raises(UnsupportedArchitectureError, match="does not know which times vLLM needs"):
        parts.video(FRAMES, SLOW)


def test_a_request_that_is_not_understood_ends_alone(whole, client, parts, ask):
    part = parts.image(held_out_images(1)[0].image)
    del part["image_embeds"]["image_grid_thw"]
    with pytest.raises(client.AnswerError, match=r"status 400: .*should contain the fields"):
        ask(whole, part)
    mixed = parts.image(held_out_images(1)[0].image), picture(held_out_images(2)[1])
    with pytest.raises(client.AnswerError, match=r"status 400: .*Mixing raw image and embedding"):
        ask(whole, *mixed)
    assert whole.healthy()


def test_embeddings_of_another_width_end_the_engine(whole, client, parts, ask):
    """What the page warns of. It is the last test, because it ends the server."""
    fields = parts.image(held_out_images(1)[0].image)["image_embeds"]
    rows = np.load(io.BytesIO(base64.b64decode(fields["image_embeds"])))
    without_levels = client.encoded(rows[:, : rows.shape[1] // 4])
    part = {"type": "image_embeds", "image_embeds": {**fields, "image_embeds": without_levels}}
    with pytest.raises(client.AnswerError, match=r"status 500: .*EngineCore encountered an issue"):
        ask(whole, part)
    assert not whole.healthy()
    with pytest.raises(client.AnswerError, match="does not answer"):
        ask(whole)
