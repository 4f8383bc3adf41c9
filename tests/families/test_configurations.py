"""What a configuration leaves out has transformers' default, and what no tower can be is refused by its name."""

from dataclasses import replace

import pytest
import torch
from safetensors.numpy import load_file, save_file

from towers import transformers_tower
from visionaccel.checkpoint import Checkpoint
from visionaccel.encoder import open_tower
from visionaccel.errors import CheckpointError, PluginError, UnsupportedArchitectureError, VisionAccelError
from visionaccel.families import family_named
from visionaccel_testing.checkpoints import (
    ARCHITECTURES,
    TINY_TOWERS,
    document_of,
    random_checkpoint,
    tower_shapes,
)

ONLY_TRANSFORMERS_SIZE = {"hidden_size": 1280}
"""Of Qwen2.5-VL: no model has transformers' default."""

PARTIAL = [
    ("Qwen2VLForConditionalGeneration", "qwen2_vl", {}),
    (
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {"hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    ),
    ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", ONLY_TRANSFORMERS_SIZE),
    (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        {"hidden_size": 1280, "in_chans": 3, "out_hidden_size": 2048, "spatial_patch_size": 14, "tokens_per_second": 2},
    ),
    ("Qwen2_5OmniForConditionalGeneration", "qwen2_5_omni", ONLY_TRANSFORMERS_SIZE),
    ("Qwen3VLForConditionalGeneration", "qwen3_vl", {}),
    ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl", {}),
    ("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni", {}),
    ("Qwen3_5ForConditionalGeneration", "qwen3_5", {}),
    ("Qwen3_5MoeForConditionalGeneration", "qwen3_5", {}),
    ("Glm4vForConditionalGeneration", "glm4v", {}),
    ("Glm4vMoeForConditionalGeneration", "glm4v", {}),
]
"""Architecture, family, and all that a configuration contains: nothing, or what is in a released file."""

ENTRIES_OF_VLLM = {"qwen3_omni": {"image_size", "apply_vit_abs_pos_embed"}, "qwen3_5": {"deepstack_visual_indexes"}}
"""Values of which only vLLM reads the configuration, or has a default."""


@pytest.mark.parametrize(("architecture", "family", "values"), PARTIAL)
def test_names_and_shapes_of_all_weights_are_those_of_transformers(architecture, family, values):
    kind = transformers_tower(architecture, family_named(family).config)
    config = kind.config_class.from_dict(dict(values))
    with torch.device("meta"):
        theirs = kind._from_config(config).state_dict()
    assert tower_shapes(values, family) == {name: tuple(weight.shape) for name, weight in theirs.items()}
    for name in family_named(family).defaults.keys() - values.keys() - ENTRIES_OF_VLLM.get(family, set()):
        ours, theirs = family_named(family).defaults[name], getattr(config, name)
        assert (list(ours) == list(theirs)) if isinstance(ours, list | tuple) else (ours == theirs), name


def described(family, values):
    return family_named(family).described(document_of(values, family), "config.json")


REFUSED = [
    (
        "qwen2_vl",
        {"hidden_act": "gelu"},
        "hidden_act is 'gelu'; only 'quick_gelu' is implemented, because vLLM ignores",
    ),
    ("qwen2_vl", {"hidden_act": None}, "hidden_act is None; only 'quick_gelu' is implemented"),
    ("qwen2_5_vl", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is implemented"),
    ("qwen2_5_omni", {"hidden_act": "gelu"}, "thinker_config.vision_config.hidden_act is 'gelu'; only 'silu'"),
    ("qwen3_vl", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'gelu_pytorch_tanh' is implemented"),
    ("qwen3_omni", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'gelu_pytorch_tanh' is implemented"),
    ("qwen3_5", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'gelu_pytorch_tanh' is implemented"),
    (
        "qwen3_5",
        {"deepstack_visual_indexes": [1]},
        r"deepstack_visual_indexes is \[1\]; only \[\] is implemented, because transformers' tower has no deepstack",
    ),
    ("glm4v", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is implemented"),
    ("glm4v", {"attention_bias": True}, "attention_bias is True; only False is implemented, because vLLM ignores"),
    ("dots_ocr", {"post_norm": False}, "post_norm is False; only True is implemented"),
    ("dots_ocr", {"temporal_patch_size": 2}, "temporal_patch_size is 2; only 1 is implemented"),
    ("dots_ocr", {"is_causal": True}, "is_causal is True; only False is implemented"),
    (
        "qwen3_omni",
        {"apply_vit_abs_pos_embed": False},
        "apply_vit_abs_pos_embed is False; only True is implemented, because transformers ignores",
    ),
]


@pytest.mark.parametrize(("family", "change", "said"), REFUSED)
def test_what_is_not_implemented_is_refused_by_its_name(family, change, said):
    with pytest.raises(UnsupportedArchitectureError, match=rf"vision_config\.{said}|{said}") as refused:
        described(family, {**TINY_TOWERS[family], **change})
    assert "Pass a released checkpoint" in str(refused.value)


@pytest.mark.parametrize("family", sorted(TINY_TOWERS))
def test_scaled_rotary_frequencies_are_refused(family):
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(UnsupportedArchitectureError, match="rope_type is 'linear'; only 'axial' is implemented"):
        described(family, {**TINY_TOWERS[family], **scaled})


IMPOSSIBLE = [
    ("qwen3_vl", {"num_position_embeddings": 143}, "num_position_embeddings is 143; it must be a square"),
    ("qwen3_vl", {"num_position_embeddings": -4}, "num_position_embeddings is -4; it must be a square"),
    ("qwen3_vl", {"deepstack_visual_indexes": [0, 3]}, r"deepstack_visual_indexes is \[0, 3\]; it must contain blocks"),
    ("qwen3_vl", {"deepstack_visual_indexes": [-1]}, r"deepstack_visual_indexes is \[-1\]; it must contain blocks"),
    ("qwen3_vl", {"deepstack_visual_indexes": [1, 1]}, r"deepstack_visual_indexes is \[1, 1\].*below depth, each once"),
    ("qwen3_vl", {"deepstack_visual_indexes": 1}, "deepstack_visual_indexes is 1 and not a list"),
    (
        "qwen3_omni",
        {"image_size": 384},
        "num_position_embeddings is 144, which transformers uses, but image_size 384 makes 9216 positions",
    ),
    ("qwen3_omni", {"patch_size": 0}, "patch_size is 0; it must be positive"),
    ("glm4v", {"patch_size": 0}, "patch_size is 0; it must be positive"),
    ("glm4v", {"image_size": 3}, r"positions\.side is 0; it must be from 1"),
    ("glm4v", {"rms_norm_eps": "tiny"}, "rms_norm_eps has 'tiny' where a finite number is expected"),
    ("dots_ocr", {"use_bias": 1}, "use_bias has 1 where true or false is expected"),
    ("qwen2_vl", {"mlp_ratio": 0.5}, "mlp_ratio has 0.5 where an integer is expected"),
    ("qwen2_5_vl", {"window_size": 33}, r"window_size is 33; it must be a multiple of .*, 8"),
]


@pytest.mark.parametrize(("family", "change", "said"), IMPOSSIBLE)
def test_what_no_tower_can_be_is_refused_by_its_name(family, change, said):
    with pytest.raises(CheckpointError, match=rf"vision_config: {said}") as refused:
        described(family, {**TINY_TOWERS[family], **change})
    assert "Check that the configuration is intact" in str(refused.value)


def test_a_value_that_is_missing_and_has_no_default_is_named():
    with pytest.raises(CheckpointError, match=r"vision_config has no 'hidden_size'.*Pass a complete checkpoint"):
        described("qwen2_5_vl", {"depth": 2})


@pytest.mark.parametrize("family", TINY_TOWERS)
def test_a_configuration_without_the_towers_part_is_refused(family):
    where = r"\.".join(family_named(family).config)
    with pytest.raises(CheckpointError, match=rf"config\.json: {where} is missing.*Pass a vision-language checkpoint"):
        family_named(family).described({"architectures": [ARCHITECTURES[family]]}, "config.json")


@pytest.mark.parametrize("family", TINY_TOWERS)
def test_any_wrong_value_is_the_configurations_fault_and_not_the_familys(family):
    values = {**family_named(family).defaults, **TINY_TOWERS[family], "rope_theta": 1e4}
    for name in values:
        for wrong in (None, -1, 0, 10**400, float("nan"), "1", [1], True):
            try:
                described(family, {**values, name: wrong})
            except PluginError as error:
                pytest.fail(f"{name} = {wrong!r}: {error}")
            except VisionAccelError:
                pass


@pytest.mark.parametrize("family", TINY_TOWERS)
@pytest.mark.parametrize("kind", ["8-bit", "packed"])
def test_quantised_weights_are_refused_and_named(tmp_path, family, kind):
    folder = random_checkpoint(tmp_path, family=family)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("blocks.0.attn.proj.weight"))
    if kind == "8-bit":
        stored[name] = stored[name].astype("int8")
    else:
        stored[name.replace(".weight", ".weight_packed")] = stored.pop(name).astype("int32")
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the vision tower is quantised: '.*blocks\.0\.attn\.proj\.weight"):
        _ = open_tower(folder).weights


def test_the_patch_embedding_of_one_frame_is_read_with_and_without_an_axis_of_time(tmp_path):
    folder = random_checkpoint(tmp_path, family="dots_ocr")
    flat = open_tower(folder)
    name = "patch_embed.patchifier.proj.weight"
    assert Checkpoint(folder).tensors[f"vision_tower.{name}"].shape == (32, 3, 4, 4)
    stored = load_file(folder / "model.safetensors")
    stored[f"vision_tower.{name}"] = stored[f"vision_tower.{name}"][:, :, None]
    save_file(stored, folder / "model.safetensors")
    deep = open_tower(folder)
    assert flat.weights[name].shape == deep.weights[name].shape == flat.spec.shapes()[name] == (32, 3, 1, 4, 4)
    assert replace(flat.weights[name], offset=0) == replace(deep.weights[name], offset=0)
