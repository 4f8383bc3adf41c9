"""Trained readers of other families: stock vLLM reads digits with them, and a backend changes no answer."""

import pytest

from digits_vlm import checkpoint_path

READERS = {
    "qwen2_vl": {"VISIONACCEL_BACKEND": "torch_ref", "VISIONACCEL_MODE": "inline"},
    "qwen3_vl": {"VISIONACCEL_BACKEND": "onnxrt"},
}
"""A backend and mode for each family; `test_families` has all of them, with random weights."""


@pytest.fixture(scope="module", params=READERS)
def both(request, ask, ask_processes):
    """The answers of stock vLLM, and those with the family's backend, whose embeddings pass between processes."""
    checkpoint = checkpoint_path(request.param)
    stock, ours = ask({}, "matrix", checkpoint), ask_processes(READERS[request.param], "matrix", checkpoint)
    for answers in (stock, ours):
        assert answers["status"] == 0, answers["log"][-4000:]
    return stock, ours


def test_stock_vllm_reads_held_out_digits(both):
    stock, _ = both
    assert stock["model"].startswith("vllm.")
    assert stock["accuracy"] >= 0.95


def test_the_backend_reads_them_as_stock_vllm_does(both):
    stock, ours = both
    assert ours["model"].startswith("visionaccel.")
    assert ours["log"].count("the vision encoder runs on backend ") == 1
    assert ours["read"] == stock["read"]


@pytest.mark.parametrize("part", ["singles", "others", "mixed", "repeated", "crowd"])
def test_tokens_are_equal_and_log_probabilities_within_1e_4(both, part):
    stock, ours = (answers["parts"][part] for answers in both)
    assert [answer["tokens"] for answer in ours] == [answer["tokens"] for answer in stock]
    for answer, expected in zip(ours, stock, strict=True):
        assert answer["logprobs"] == pytest.approx(expected["logprobs"], rel=0, abs=1e-4)
