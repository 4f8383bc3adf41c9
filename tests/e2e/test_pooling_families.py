"""Pooling models of several families answer as with vLLM's own encoder, and an image that fails ends its own requests.

`make families` compares all of them with every backend in each mode.
"""

import json

import numpy as np
import pytest

from families import MODES, TOLERANCE, ask, difference, write_models
from pooling_models import POOLING

ASKED = {
    "pipelined": tuple(POOLING),
    "in-line": ("Qwen3-VL-Embedding", "Qwen3-VL-Reranker", "jina-embeddings-v4", "ColQwen3"),
}
"""The models that are asked in each mode."""

IMAGES = 12
"""The first prompts have one image each."""

VICTIM, FAILING = 60, {3, 16}
"""Patches of the image that fails, and the prompts with that image."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with their checkpoints."""
    return write_models(tmp_path_factory.mktemp("models"), POOLING)


@pytest.fixture(scope="module")
def stock(models, tmp_path_factory):
    """What they answer with no backend named."""
    return ask(models, list(POOLING), {}, tmp_path_factory.mktemp("stock") / "asked")


@pytest.fixture(scope="module", params=ASKED)
def accelerated(request, models, tmp_path_factory):
    """A mode, and what models answer in it with a simulated device that fails with one image."""
    settings = {
        "VISIONACCEL_BACKEND": "simulated",
        "VISIONACCEL_DEVICE": "onnxrt",
        "VISIONACCEL_MODE": MODES[request.param],
        "VISIONACCEL_OPTIONS": json.dumps({"faults": [{"patches": VICTIM, "do": "raise"}]}),
    }
    folder = tmp_path_factory.mktemp("accelerated") / "asked"
    return request.param, ask(models, ASKED[request.param], settings, folder)


@pytest.mark.parametrize("name", POOLING)
def test_every_image_has_other_numbers(stock, name):
    last = [np.ravel(np.atleast_2d(answer)[-1]) for answer in stock.by_model[name][:IMAGES]]
    gaps = [np.abs(one - other).max() for place, one in enumerate(last) for other in last[:place]]
    assert min(gaps) > 0
    assert np.median(gaps) > 100 * TOLERANCE


def test_numbers_are_those_of_stock_and_a_failed_image_has_a_reason(stock, accelerated):
    mode, ours = accelerated
    for name in ASKED[mode]:
        expected, found = stock.by_model[name], ours.by_model[name]
        assert len(found) == len(expected) >= 29
        for place, answer in enumerate(found):
            if place in FAILING:
                assert "of the prompt could not be encoded: simulated fault" in answer, (name, place)
            else:
                assert difference(answer, expected[place]) <= TOLERANCE, (name, place)


def test_the_backend_is_really_in_use(accelerated):
    mode, ours = accelerated
    runs = f"runs on backend 'simulated', device simulated:onnxrt/cpu (simulated), float32 arithmetic, {mode}, and"
    assert ours.log.count(runs) == len(ASKED[mode])
    if mode == "pipelined":
        assert ours.log.count(" 0 were encoded in-line") == len(ASKED[mode])
