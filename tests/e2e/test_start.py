"""vLLM starts with what it was asked for, or refuses with a reason."""

import json
import shutil
from pathlib import Path

import pytest

from visionaccel.bundle import ProgramRequest, export_bundle, strip_checkpoint
from visionaccel.checkpoint import Checkpoint
from visionaccel.core.program import AnyGrid
from visionaccel.encoder import open_tower


def tokens(answers):
    return [answer["tokens"] for answer in answers]


@pytest.fixture(scope="module")
def stripped(digits, tmp_path_factory):
    """The digits checkpoint without its vision weights."""
    folder = tmp_path_factory.mktemp("stripped") / "checkpoint"
    strip_checkpoint(Checkpoint(digits), folder)
    return folder


@pytest.fixture(scope="module")
def other_family(digits, tmp_path_factory):
    """A checkpoint folder that says it is a LLaVA."""
    folder = Path(shutil.copytree(digits, tmp_path_factory.mktemp("other") / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **sizes},
        "text_config": {
            **{name: value for name, value in config["text_config"].items() if name != "rope_parameters"},
            "model_type": "qwen2",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_stripped_checkpoint_loads_with_a_bundle(ask, stock, stripped, digits, tmp_path):
    requests = [ProgramRequest(AnyGrid())]
    bundle = export_bundle(open_tower(digits), tmp_path / "bundle", requests, self_contained=True)
    answers = ask({"VISIONACCEL_BACKEND": "auto", "VISIONACCEL_BUNDLE": str(bundle.folder)}, "few", stripped)
    assert "the vision encoder runs on backend 'onnxrt'" in answers["log"], answers["log"][-4000:]
    assert answers["status"] == 0, answers["log"][-4000:]
    for part in ("first", "video"):
        assert tokens(answers["parts"][part]) == tokens(stock["parts"][part])


def test_a_stripped_checkpoint_alone_is_refused(ask_processes, stripped):
    answers = ask_processes({"VISIONACCEL_BACKEND": "onnxrt"}, "few", stripped)
    assert answers["status"] != 0
    assert "contains no vision weights" in answers["log"]
    assert "set VISIONACCEL_BUNDLE" in answers["log"], "from the worker, through the engine's process"


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"VISIONACCEL_BACKEND": "onnxtr"}, ["no installed backend is named 'onnxtr'", "Did you mean 'onnxrt'"]),
        ({"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_FALLBACK": "torch"}, ["no installed backend is named 'torch'"]),
        (
            {"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_MODE": "x"},
            ["VISIONACCEL_MODE='x'", "'auto', 'pipelined' or 'inline'"],
        ),
        (
            {"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_DEVICE": "npu"},
            ["has no VitisAIExecutionProvider", "Ryzen AI Software"],
        ),
        ({"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_BUNDLE": "no/such"}, ["'no/such' is not a folder"]),
        (
            {"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_CPU_CORES": "4096"},
            ["VISIONACCEL_CPU_CORES=4096: this process may not use 4096", "It may use 0"],
        ),
        ({"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_FALLBACK": "auto"}, ["a fallback must be chosen by name"]),
    ],
    ids=["backend", "fallback", "setting", "device", "bundle", "cores", "automatic fallback"],
)
def test_what_cannot_run_is_refused_with_the_reason(ask, settings, messages):
    answers = ask(settings, "few")
    assert answers["status"] != 0
    assert all(message in answers["log"] for message in messages), answers["log"][-4000:]


def test_an_encoder_of_another_model_is_refused(ask, tiny):
    answers = ask({"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_BUNDLE": str(tiny)}, "few")
    assert answers["status"] != 0
    assert "was made from different vision weights" in answers["log"]


def test_without_room_for_images_no_encoder_is_opened(ask, stripped):
    answers = ask({"VISIONACCEL_BACKEND": "torch_ref"}, "text", stripped)
    assert answers["status"] == 0, answers["log"][-4000:]
    assert "the vision encoder runs on" not in answers["log"]


def test_a_model_of_another_family_is_refused(ask, other_family):
    answers = ask({"VISIONACCEL_BACKEND": "onnxrt"}, "few", other_family)
    assert answers["status"] != 0
    assert "the vision encoder of LlavaForConditionalGeneration is not implemented" in answers["log"]


def test_the_fallback_takes_over_a_backend_that_cannot_start(ask, stock):
    settings = {"VISIONACCEL_BACKEND": "onnxrt", "VISIONACCEL_DEVICE": "npu", "VISIONACCEL_FALLBACK": "torch_ref"}
    answers = ask(settings, "few")
    assert answers["status"] == 0, answers["log"][-4000:]
    assert "Starting with the fallback 'torch_ref', because" in answers["log"]
    assert tokens(answers["parts"]["first"]) == tokens(stock["parts"]["first"])
