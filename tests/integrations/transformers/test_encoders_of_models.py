"""Which encoder a model gets: its weights as they are now, settings, bundles and fallbacks, and what is refused."""

import json
import logging
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from bundles import write_bundle
from questions import answered
from visionaccel.bundle import Golden, open_bundle, write_golden
from visionaccel.core.grid import Grid
from visionaccel.errors import (
    CheckpointError,
    ConfigurationError,
    DeviceError,
    GridError,
    NonFiniteError,
    OutputError,
    PatchesError,
    SettingsError,
    UnfitGridError,
    UnknownBackendError,
    UnsupportedArchitectureError,
)
from visionaccel.integrations.transformers import accelerate, load
from visionaccel.observe import EncoderMetrics, timed_encodes

LAYER = "model.visual.blocks.0.mlp.linear_fc1"


def embeddings(model, inputs):
    with torch.inference_mode():
        found = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    return torch.cat(tuple(found))


def close(ours, theirs):
    return (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.fixture(scope="module")
def fixed(checkpoint, tmp_path_factory):
    """A bundle with the checkpoint's weights that takes only the first of the two images, of grid 6x8."""
    return write_bundle(checkpoint, tmp_path_factory.mktemp("fixed") / "bundle", "6x8", self_contained=True)


@pytest.fixture(scope="module")
def other(checkpoint, tmp_path_factory):
    """The same checkpoint with one changed vision weight."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"{LAYER}.bias"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def failing(**rule):
    """Settings of a device that computes as onnxrt does, except for what a rule says."""
    return {"backend": "simulated", "device": "onnxrt", "settings": {"options": {"faults": [rule]}, "canary": "off"}}


# What is read from a model in memory


def test_weights_that_changed_since_loading_are_used(model, inputs):
    before = embeddings(model, inputs)
    with torch.no_grad():
        model.get_submodule(LAYER).weight.mul_(-1)
    theirs = embeddings(model, inputs)
    assert not close(before, theirs)
    with accelerate(model, backend="onnxrt"):
        assert close(embeddings(model, inputs), theirs)


def test_a_model_whose_configuration_names_no_architecture_is_known_by_its_class(checkpoint, inputs):
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    config.architectures = None
    for kind in (transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLModel):
        model = kind(config)
        theirs = embeddings(model, inputs)
        with accelerate(model, backend="onnxrt"):
            assert close(embeddings(model, inputs), theirs)


def test_a_model_within_a_retriever_gets_the_encoder(written, told):
    config = transformers.AutoConfig.from_pretrained(written("Qwen2VLForConditionalGeneration"))
    model = transformers.ColQwen2ForRetrieval(transformers.ColQwen2Config(vlm_config=config, embedding_dim=16)).eval()
    image = {"pixel_values": torch.randn(1, 16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    ids = torch.tensor([[5, *[config.image_token_id] * 4, 6]])

    def vectors():
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), **image).embeddings

    theirs = vectors()
    with accelerate(model, backend="onnxrt"):
        assert close(vectors(), theirs)
    assert [each.purpose for each in told.encoded].count("request") == 1


@pytest.mark.parametrize("thing", ["a path", nn.Linear(2, 2)], ids=type)
def test_what_has_no_tower_is_refused(thing):
    with pytest.raises(UnsupportedArchitectureError, match="finds no vision tower"):
        accelerate(thing, backend="onnxrt")


def test_an_unknown_tower_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 28, "patch_size": 14},
        text_config={"model_type": "llama", **sizes, "vocab_size": 64},
        image_token_index=5,
    )
    with pytest.raises(UnsupportedArchitectureError, match="its architecture is LlavaForConditionalGeneration"):
        accelerate(transformers.LlavaForConditionalGeneration(config), backend="onnxrt")


@pytest.mark.parametrize("names", ["onnx", "torch_ref,onnx", "auto"])
def test_a_fallback_that_is_not_installed_is_refused_at_once(model, names):
    with pytest.raises((UnknownBackendError, SettingsError)):
        accelerate(model, backend="onnxrt", fallback=names)


def test_pixels_without_grids_are_an_error_of_ours(model, inputs):
    with accelerate(model, backend="onnxrt"), pytest.raises(GridError, match="without their grids"):
        model.model.visual(inputs["pixel_values"], grid_thw=None)


def test_a_part_of_the_processor_cannot_fit_images(model, processor):
    with (
        accelerate(model, backend="onnxrt") as handle,
        pytest.raises(ConfigurationError, match=r"has no image processor\. Pass the model's whole AutoProcessor"),
    ):
        handle.fitter(processor.tokenizer)


def test_a_tower_that_no_family_describes_is_refused_by_the_models_name(model):
    model.model.visual.config.hidden_act = "silu"
    with pytest.raises(
        UnsupportedArchitectureError, match=r"^this Qwen3VLForConditionalGeneration: vision_config.hidden_act is 'silu'"
    ):
        accelerate(model, backend="onnxrt")


def adapted(layer):
    """Add what PEFT adds to a layer."""
    layer.base_layer, layer.lora_A, layer.lora_B = nn.Linear(64, 96), nn.Linear(64, 4), nn.Linear(4, 96)
    del layer.weight, layer.bias


def quantised(layer):
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (adapted, "is part of an adapter that is not merged"),
        (quantised, "the vision tower is quantised"),
        (lambda layer: layer.to("meta"), "are offloaded or quantised"),
        (lambda layer: layer.register_buffer("more", torch.zeros(1)), "unknown weight"),
    ],
    ids=["adapter", "float8", "offloaded", "unknown"],
)
def test_weights_that_no_encoder_can_have_are_refused(model, change, reason):
    change(model.get_submodule(LAYER))
    with pytest.raises(CheckpointError, match=reason):
        accelerate(model, backend="onnxrt")


# Settings


def test_variables_are_defaults_and_arguments_win(model, monkeypatch):
    monkeypatch.setenv("VISIONACCEL_BACKEND", "torch_ref")
    monkeypatch.setenv("VISIONACCEL_FALLBACK", "onnxrt")
    for given, names in [({}, ["torch_ref", "onnxrt"]), ({"backend": "onnxrt", "fallback": "none"}, ["onnxrt"])]:
        with accelerate(model, **given) as handle:
            assert [link.name for link in handle.encoder.links] == names


def test_other_settings_are_given_by_name_and_the_arguments_among_them_too(model, checkpoint):
    with accelerate(model, settings={"backend": "torch_ref", "deadline": 7.0}) as handle:
        assert handle.encoder.primary.backend == "torch_ref"
        assert handle.encoder.links[0].deadline == 7.0
    with pytest.raises(UnknownBackendError, match="unheard"):
        load(checkpoint, settings={"backend": "unheard"})
    with pytest.raises(SettingsError, match="VISIONACCEL_COLOUR"):
        accelerate(model, settings={"colour": "red"})


# Bundles


def test_a_bundle_of_the_same_weights_takes_the_towers_place(model, checkpoint, inputs, tmp_path):
    external = write_bundle(checkpoint, tmp_path / "bundle", "6x8", "10x4")
    theirs = answered(model, inputs).tokens
    with accelerate(model, backend="onnxrt", bundle=external) as handle:
        assert len(handle.encoder.primary.programs) == 2
        assert answered(model, inputs).tokens.equal(theirs)
    with load(checkpoint, backend="onnxrt", bundle=external) as handle:
        assert answered(handle.model, inputs).tokens.equal(theirs)


def test_an_image_that_no_program_takes_is_named_and_a_fallback_takes_it(model, inputs, fixed):
    theirs = answered(model, inputs).tokens
    with accelerate(model, backend="onnxrt", bundle=fixed):
        with pytest.raises(UnfitGridError, match="no program of this encoder accepts grid 1x10x4") as failed:
            answered(model, inputs)
        assert failed.value.__notes__ == ["This is image or video 2 of 2 in this call."]
    with accelerate(model, backend="onnxrt", bundle=fixed, fallback="torch_ref") as handle:
        assert answered(model, inputs).tokens.equal(theirs)
        assert handle.encoder.fallback_items == 1


@pytest.mark.parametrize("opened", [accelerate, load])
def test_an_encoder_of_other_weights_or_another_configuration_is_refused(model, checkpoint, other, tmp_path, opened):
    subject = model if opened is accelerate else checkpoint
    named = "this Qwen3VLForConditionalGeneration" if opened is accelerate else str(checkpoint)
    with pytest.raises(ConfigurationError, match=f"was made from different vision weights than those of {named}"):
        opened(subject, backend="onnxrt", bundle=other)
    shutil.copytree(checkpoint, tmp_path / "levels")
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["deepstack_visual_indexes"] = [0, 1, 2]
    (tmp_path / "levels" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="was made for a different vision configuration"):
        opened(subject, backend="onnxrt", bundle=tmp_path / "levels")


def test_an_encoder_that_gets_golden_images_wrong_does_not_start(model, inputs, fixed, tmp_path):
    shutil.copytree(fixed, tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    patches = inputs["pixel_values"][:48].numpy()
    wrong = np.random.default_rng(0).standard_normal((12, bundle.tower.out_width), np.float32)
    golden = Golden("noise", bundle.manifest.programs[0].name, (Grid(1, 6, 8),), patches, wrong, 0.999)
    write_golden(bundle, [golden], {})
    own = model.model.visual
    with pytest.raises(DeviceError, match="failed its canary and cannot be trusted: golden image noise"):
        accelerate(model, backend="onnxrt", bundle=tmp_path / "bundle")
    assert model.model.visual is own
    with accelerate(model, backend="onnxrt", bundle=tmp_path / "bundle", settings={"canary": "off"}):
        pass


# Failures


def test_a_wrong_image_is_named(model, inputs):
    pixels, grids = inputs["pixel_values"].clone(), inputs["image_grid_thw"]
    pixels[-1, 0] = float("nan")
    with accelerate(model, backend="onnxrt"):
        with pytest.raises(NonFiniteError) as failed:
            model.get_image_features(pixels, grids)
        assert failed.value.__notes__ == ["This is image or video 2 of 2 in this call."]
        with pytest.raises(PatchesError, match="87 patches were given") as failed:
            model.model.visual(pixels[:-1], grid_thw=grids)
        assert not hasattr(failed.value, "__notes__"), "it is unknown which image has too few"
        assert close(embeddings(model, inputs), embeddings(model, inputs)), "the encoder stays usable"


@pytest.mark.parametrize(("fault", "error"), [("raise", DeviceError), ("nan", OutputError), ("zeros", OutputError)])
def test_what_a_device_does_to_an_image_is_an_error_or_left_to_the_fallback(model, inputs, fault, error, caplog):
    theirs = answered(model, inputs)
    settings = failing(patches=40, do=fault)  # the second image
    with accelerate(model, **settings):
        with pytest.raises(error) as failed:
            answered(model, inputs)
        assert failed.value.__notes__ == ["This is image or video 2 of 2 in this call."]
    with accelerate(model, **settings, fallback="onnxrt") as handle:
        assert answered(model, inputs).tokens.equal(theirs.tokens)
        assert handle.encoder.fallback_items == 1
    assert "using fallback 'onnxrt' (1 images so far)" in caplog.text


def test_metrics_timing_and_timeline_are_those_of_vllm(model, inputs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    settings = failing(call=1, do="raise")
    settings["settings"] |= {"timing": True, "trace": tmp_path / "trace.json"}

    def counted(name):
        return Counter({tuple(labels): value for labels, value in EncoderMetrics.install().snapshot()[name]})

    patches, failures = counted("visionaccel_patches"), counted("visionaccel_failures")  # of earlier tests
    with accelerate(model, **settings) as handle:
        device = handle.encoder.primary.capabilities.device
        embeddings(model, inputs)
    assert counted("visionaccel_patches") - patches == {("simulated", device): 88.0}
    assert counted("visionaccel_failures") - failures == {("simulated", device, "DeviceError"): 1.0}
    assert [record["grids"] for record in timed_encodes(caplog.text)] == [["1x6x8"], ["1x10x4"]], "each alone"
    assert device in (tmp_path / "trace.json").read_text()


@pytest.mark.parametrize(
    ("name", "value", "difference"),
    [("num_heads", 4, "heads is 2, not 4"), ("deepstack_visual_indexes", [0, 1, 2], r"not \[0, 1, 2\]")],
)
def test_a_changed_configuration_is_refused_while_loading(checkpoint, name, value, difference):
    """The model's own tower would compute with it, the encoder with the checkpoint's."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    setattr(config.vision_config, name, value)
    with pytest.raises(ConfigurationError, match=f"changes the vision tower of .*{difference}"):
        load(checkpoint, backend="torch_ref", config=config)


@pytest.mark.parametrize("name", ["subfolder", "state_dict", "output_loading_info"])
def test_arguments_that_load_other_files_or_return_more_are_refused(checkpoint, name):
    with pytest.raises(ConfigurationError, match=f"does not accept from_pretrained's argument '{name}'"):
        load(checkpoint, backend="torch_ref", **{name: {"other": 1}})
