"""A pooling model answers as with vLLM's own encoder, and an image that fails ends its own request only."""

import json
import urllib.error
import urllib.request

import pytest

from digits_vlm.samples import held_out_images
from forked import WORKER_IN_ENGINE, servers
from message_parts import picture
from visionaccel_bench.server import serve

QUESTION = "Read the digits."
MODES = ("inline", "pipelined")
IMAGES = held_out_images(6)
VICTIM = 2
HEALTHY = [place for place in range(7) if place != VICTIM]  # the first image is asked once more, at the end


def settings(mode):
    """A simulated device that fails with the victim."""
    image = IMAGES[VICTIM].image
    patches = round(image.height / 28) * round(image.width / 28) * 4
    return {
        "VISIONACCEL_BACKEND": "simulated",
        "VISIONACCEL_DEVICE": "onnxrt",
        "VISIONACCEL_MODE": mode,
        "VISIONACCEL_OPTIONS": json.dumps({"faults": [{"patches": patches, "do": "raise"}]}),
    }


@pytest.fixture(scope="module", params=["embed", "classify"])
def task(request, ask):
    """A pooling task, and stock vLLM's results."""
    answers = ask({}, part=request.param)
    assert answers["status"] == 0, answers["log"][-4000:]
    return request.param, answers["parts"]


@pytest.mark.parametrize("mode", MODES)
def test_results_and_scores_are_those_of_stock_and_a_failed_image_has_a_reason(ask, task, mode):
    part, stock = task
    ours = ask(settings(mode), part=part)
    assert ours["status"] == 0, ours["log"][-4000:]
    results, expected = ours["parts"]["results"], stock["results"]
    assert "of the prompt could not be encoded: simulated fault" in results[VICTIM]
    for place in HEALTHY:
        assert results[place] == pytest.approx(expected[place], rel=0, abs=1e-4)
    assert len({tuple(numbers) for numbers in expected[:6]}) == 6, "every image has another result"
    assert ours["parts"]["scores"] == pytest.approx(stock["scores"], rel=0, abs=1e-4)


def post(server, path, body):
    """Status and text of an answer."""
    url = server.url.removesuffix("/v1") + path
    data = json.dumps({"model": server.model, **body}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_server_outlives_an_image_that_fails(digits):
    def of(sample):
        return {"messages": [{"role": "user", "content": [picture(sample), {"type": "text", "text": QUESTION}]}]}

    arguments = ("--runner", "pooling", "--convert", "embed", "--dtype", "float32", "--enforce-eager")
    few = ("--max-model-len", "2048", "--max-num-seqs", "4")
    with servers(), serve(digits, settings("pipelined") | WORKER_IN_ENGINE, (*arguments, *few)) as server:
        before = post(server, "/v1/embeddings", of(IMAGES[0]))
        assert before[0] == 200, before
        pair = {"text_1": QUESTION, "text_2": {"content": [picture(IMAGES[VICTIM])]}}
        for path, body in (("/v1/embeddings", of(IMAGES[VICTIM])), ("/score", pair)):
            status, text = post(server, path, body)
            assert status == 500, (path, text)
            assert "image 1 of the prompt could not be encoded: simulated fault" in text
            assert server.healthy()
        after = post(server, "/v1/embeddings", of(IMAGES[0]))
        assert after[0] == 200, after
        assert json.loads(after[1])["data"] == json.loads(before[1])["data"]
