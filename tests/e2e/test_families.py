"""A model of each family answers as in stock vLLM with its encoder on a backend. `make families` tries every one.

Qwen2.5-VL's is the digits reader, which other tests ask more.
"""

import pytest

from families import ask, compared, settings_of, write_models
from visionaccel.families import family_for
from whole_models import MODELS

ASKED = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "DotsOCRForCausalLM",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with their checkpoints."""
    return write_models(tmp_path_factory.mktemp("models"), ASKED)


@pytest.fixture(scope="module")
def stock(models, tmp_path_factory):
    """What they answer with no backend named."""
    return ask(models, ASKED, {}, tmp_path_factory.mktemp("stock") / "asked")


@pytest.fixture(scope="module", params=[("onnxrt", "pipelined"), ("torch_ref", "in-line")], ids=lambda each: each[0])
def accelerated(request, models, tmp_path_factory):
    """What they answer with a backend in a mode."""
    folder = tmp_path_factory.mktemp("accelerated") / "asked"
    return *request.param, ask(models, ASKED, settings_of(*request.param), folder)


def test_a_model_of_every_family_is_asked_here_or_elsewhere():
    from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES

    served = {family_for(architecture).name for architecture in ARCHITECTURES}
    assert served == {MODELS[architecture].family for architecture in (*ASKED, "Qwen2_5_VLForConditionalGeneration")}


@pytest.mark.parametrize("architecture", ASKED)
def test_the_models_vary_and_their_prompts_use_what_vllm_does_with_them(stock, architecture):
    answers = stock.by_model[architecture]
    assert len(answers) >= 28
    assert len({tuple(answer["tokens"]) for answer in answers}) >= 10
    assert max(answer["steps"] for answer in answers) > 1, "some are computed in chunks"
    cached = any(answer["cached_tokens"] for answer in answers)
    assert cached == MODELS[architecture].engine.get("enable_prefix_caching", True)


@pytest.mark.parametrize("architecture", ASKED)
def test_tokens_are_equal_and_log_probabilities_within_1e_4(stock, accelerated, architecture):
    backend, mode, ours = accelerated
    row = compared(architecture, backend, mode, stock, ours)
    assert row.equal == row.prompts
    assert row.difference <= 1e-4


def test_the_backend_is_really_in_use(accelerated):
    backend, mode, ours = accelerated
    runs = f"the vision encoder runs on backend '{backend}', device cpu, float32 arithmetic, {mode}, and takes any grid"
    assert ours.log.count(runs) == len(ASKED)
    if mode == "pipelined":
        assert ours.log.count(" 0 failed, 0 were cancelled, 0 were encoded in-line") == len(ASKED)
        assert "is encoded in the engine's step" not in ours.log, "sound is not taken for an image"
