"""Models of every family answer with an encoder as with their own tower, in memory or loaded without it."""

from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from questions import answered, batches
from visionaccel.errors import UnsupportedArchitectureError
from visionaccel.families import supported_architectures
from visionaccel.integrations.transformers import accelerate, load
from whole_models import MODELS

ARCHITECTURES = [name for name, model in MODELS.items() if model.family != "dots_ocr"]

FEW = ("several images", "videos")


class Asked(NamedTuple):
    """A checkpoint, its model with its own tower, and what that answers to batches of prompts.

    Architectures with the same tower as an earlier one are tried with one backend.
    """

    folder: Any
    backends: tuple[str, ...]
    model: Any
    batches: Any
    answers: Any


@pytest.fixture(scope="module", params=ARCHITECTURES)
def own(request, written):
    import transformers

    folder, described = written(request.param), MODELS[request.param]
    kind = getattr(transformers, "Qwen2_5OmniForConditionalGeneration" if "2_5Omni" in request.param else request.param)
    model = kind.from_pretrained(folder)
    asked = batches(described, AutoProcessor.from_pretrained(folder))
    first = next(name for name in ARCHITECTURES if MODELS[name].family == described.family)
    backends = ("onnxrt", "torch_ref", "openvino") if request.param == first else ("onnxrt",)
    return Asked(folder, backends, model, asked, {name: answered(model, batch) for name, batch in asked.items()})


def require_equal(model, own, *names):
    for name in names or own.batches:
        ours, theirs = answered(model, own.batches[name]), own.answers[name]
        assert ours.tokens.equal(theirs.tokens), name
        assert (ours.log_probabilities - theirs.log_probabilities).abs().max() <= 1e-4, name


def test_the_answers_vary_and_depend_on_every_image(own):
    rows = [tuple(row) for answers in own.answers.values() for row in answers.tokens.tolist()]
    assert len(rows) == 20
    assert len(set(rows)) >= 8
    first = own.answers["images"].log_probabilities[:, 0]
    others = torch.cdist(first, first, p=torch.inf) + torch.eye(len(first))
    assert others.min() > 1e-2, "a hundred times what may differ"


def test_a_model_in_memory_answers_as_with_its_own_tower(own):
    for backend in own.backends:
        with accelerate(own.model, backend=backend):
            require_equal(own.model, own, *(FEW if backend != "onnxrt" else ()))


def test_a_model_loaded_without_its_tower_answers_as_with_it(own):
    with load(own.folder, backend="onnxrt") as handle:
        assert type(handle.model) is type(own.model)
        assert handle.model.config.to_dict() == own.model.config.to_dict()
        assert not any(".visual." in f".{name}" for name, _ in handle.model.named_parameters())
        require_equal(handle.model, own, *FEW)


def test_a_saved_model_has_every_tensor_of_its_own_and_can_be_loaded(own, tmp_path):
    expected = own.model.state_dict()
    with load(own.folder, backend="onnxrt") as handle:
        handle.model.save_pretrained(tmp_path / "loaded")
    with accelerate(own.model, backend="onnxrt"):
        own.model.save_pretrained(tmp_path / "accelerated")
    for folder in tmp_path.iterdir():
        again = type(own.model)
        if (own.folder / "spk_dict.pt").exists():
            (folder / "spk_dict.pt").write_bytes((own.folder / "spk_dict.pt").read_bytes())
        found = again.from_pretrained(folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(
            tensor.dtype == expected[name].dtype and tensor.equal(expected[name]) for name, tensor in found.items()
        )


@pytest.mark.parametrize("architecture", ["Qwen2VLForConditionalGeneration", "Qwen2_5OmniForConditionalGeneration"])
def test_a_model_can_have_both(written, architecture):
    folder = written(architecture)
    asked = batches(MODELS[architecture], AutoProcessor.from_pretrained(folder))["images"]
    with load(folder, backend="onnxrt", keep_tower=True) as handle:
        ours = answered(handle.model, asked)
        with handle.own_tower():
            assert answered(handle.model, asked).tokens.equal(ours.tokens)


def test_a_thinker_is_loaded_by_itself(written, caplog):
    folder = written("Qwen2_5OmniForConditionalGeneration")
    asked = batches(MODELS["Qwen2_5OmniForConditionalGeneration"], AutoProcessor.from_pretrained(folder))["images"]
    kind = Qwen2_5OmniThinkerForConditionalGeneration
    theirs = answered(kind.from_pretrained(folder), asked)
    caplog.clear()
    with load(folder, model_class=kind, backend="onnxrt") as handle:
        assert answered(handle.model, asked).tokens.equal(theirs.tokens)
    assert "UNEXPECTED" not in caplog.text, "weights that are left out on purpose are not reported"


def test_every_family_is_tried():
    pooling = {"JinaVLForRanking", "ColQwen3", "OpsColQwen3Model", "Qwen3VLNemotronEmbedModel", "ColQwen3_5"}
    assert {*ARCHITECTURES, *pooling, "DotsOCRForCausalLM"} == supported_architectures()


def test_a_family_that_transformers_does_not_have_is_refused_and_its_code_is_not_run(written):
    with pytest.raises(UnsupportedArchitectureError, match="has no class for DotsOCRForCausalLM"):
        load(written("DotsOCRForCausalLM"), backend="onnxrt")
