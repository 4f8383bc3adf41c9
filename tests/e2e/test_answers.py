"""vLLM answers the same with its vision encoder on a backend as without."""

import pytest


def test_stock_vllm_reads_held_out_digits(stock):
    assert stock["accuracy"] >= 0.95
    assert len({tuple(grid) for grid in stock["grids"]}) >= 20


def test_with_no_backend_named_vllm_is_left_alone(stock):
    assert stock["scheduler"] == "None"
    assert stock["model"].startswith("vllm.")
    assert "visionaccel" not in stock["log"].replace("/visionaccel", "")


def test_the_backend_is_really_in_use(accelerated):
    runs = f"the vision encoder runs on backend '{accelerated['backend']}', device cpu, float32 arithmetic"
    assert accelerated["log"].count(f"{runs}, {accelerated['mode']}, and") == 1, "one encoder, in one process"
    assert accelerated["model"].startswith("visionaccel.")


def test_a_former_name_is_deprecated_in_one_line_for_all_processes(accelerated):
    lines = accelerated["log"].count("VLLM_VISION_NPU_BACKEND is deprecated; set VISIONACCEL_BACKEND instead.")
    assert lines == (1 if accelerated["variable"].startswith("VLLM_") else 0)


@pytest.mark.parametrize("part", ["singles", "others", "mixed", "repeated", "crowd"])
def test_tokens_are_equal_and_log_probabilities_within_1e_4(stock, accelerated, part, record_property):
    theirs, ours = stock["parts"][part], accelerated["parts"][part]
    assert len(theirs) == len(ours)
    assert [answer["tokens"] for answer in ours] == [answer["tokens"] for answer in theirs]
    for answer, expected in zip(ours, theirs, strict=True):
        assert answer["logprobs"] == pytest.approx(expected["logprobs"], rel=0, abs=1e-4)
    shown = "prompts whose tokens are equal to stock vLLM's in float32, log-probabilities within 1e-4"
    record_property(f"evidence: {shown}: {accelerated['backend']}, {accelerated['mode']}", len(ours))


def test_300_images_are_read_as_stock_vllm_reads_them(stock, accelerated, record_property):
    assert len(stock["read"]) == 300
    assert accelerated["read"] == stock["read"]
    shown = "held-out images read as stock vLLM reads them"
    record_property(f"evidence: {shown}: {accelerated['backend']}, {accelerated['mode']}", len(stock["read"]))
