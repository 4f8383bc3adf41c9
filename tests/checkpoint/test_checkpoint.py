"""Checkpoints are read as they are, and refused with a reason when they are broken."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from visionaccel.checkpoint import Checkpoint, locate_checkpoint, weights_digest
from visionaccel.encoder import open_tower
from visionaccel.errors import CheckpointError, UnsupportedArchitectureError
from visionaccel.families import tower_of
from visionaccel_testing.checkpoints import TINY, random_checkpoint, tower_shapes


@pytest.fixture
def copy(tiny, tmp_path):
    """A private copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_offsets_point_at_the_tensors_bytes(tmp_path, dtype, shards):
    folder = random_checkpoint(tmp_path, dtype=dtype, shards=shards, prefix="model.visual.")
    found = Checkpoint(folder).with_prefix(("model.visual.", "visual."))
    assert {name: stored.shape for name, stored in found.items()} == tower_shapes(TINY)
    for stored in found.values():
        assert stored.dtype == dtype
        with safe_open(stored.file, "numpy") as shard:
            expected = shard.get_tensor(stored.name).tobytes()
        assert stored.file.read_bytes()[stored.offset : stored.offset + stored.length] == expected


def test_shards_behind_symbolic_links_are_resolved_to_one_folder(tmp_path):
    """The layout of the Hugging Face cache: links in `snapshots/` to files in `blobs/`."""
    real = random_checkpoint(tmp_path / "blobs", shards=2)
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    checkpoint = Checkpoint(snapshot)
    assert {stored.file.parent for stored in checkpoint.tensors.values()} == {real}


def edit_header(file, change):
    """Change the header of a safetensors file in place of its own."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000])
def test_truncated_weights_are_refused(copy, keep):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        _ = Checkpoint(copy).tensors


def test_one_missing_byte_is_enough(copy):
    weights = copy / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="should end at byte"):
        _ = Checkpoint(copy).tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F16"}, "does not fit its"),
        ({"data_offsets": [8, 4]}, "does not fit its"),
        ({"data_offsets": [0]}, "malformed"),
        ({"data_offsets": "ab"}, "malformed"),
        ({"shape": None}, "malformed"),
        ({"shape": [float("inf")]}, "not a number"),
    ],
)
def test_inconsistent_headers_are_refused(copy, change, message):
    edit_header(copy / "model.safetensors", lambda header: header["visual.merger.mlp.0.weight"].update(change))
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint(copy).tensors


@pytest.mark.parametrize("content", [b"\x10\0\0\0\0\0\0\0[1, 2, 3, 4, 5]x", b"\x10\0\0\0\0\0\0\0not json at all!"])
def test_headers_that_are_no_json_object_are_refused(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        _ = Checkpoint(copy).tensors


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ', "[]", "\x00"])
def test_a_configuration_that_is_no_json_object_is_refused(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(copy)


def test_architectures_that_are_not_a_list_are_none(copy):
    edit_json(copy / "config.json", architectures=5)
    with pytest.raises(UnsupportedArchitectureError, match=r"config\.json lists no architecture"):
        open_tower(copy)


def test_a_git_lfs_pointer_is_recognised(copy):
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        _ = Checkpoint(copy).tensors


def test_missing_files_are_named(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors\.index\.json nor"):
        _ = Checkpoint(copy).tensors
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        Checkpoint(copy)
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        locate_checkpoint(tmp_path / "nowhere")


def test_a_missing_shard_is_named(tmp_path):
    folder = random_checkpoint(tmp_path, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        _ = Checkpoint(folder).tensors


def test_an_index_and_shards_of_different_revisions_are_refused(tmp_path):
    folder = random_checkpoint(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "visual.extra": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"no shard contains, such as 'visual\.extra'"):
        _ = open_tower(folder).weights


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", 7, ["a"]])
def test_an_index_cannot_name_files_outside_its_folder(tmp_path, shard):
    folder = random_checkpoint(tmp_path, shards=2)
    edit_json(
        folder / "model.safetensors.index.json",
        weight_map={"visual.x": shard, "visual.y": "model-00001-of-00002.safetensors"},
    )
    with pytest.raises(CheckpointError, match="outside its folder"):
        _ = Checkpoint(folder).tensors


def test_a_language_tensor_that_the_index_lists_and_no_shard_holds_is_ignored(tmp_path):
    folder = random_checkpoint(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "lm_head.weight": "model-00001-of-00002.safetensors"})
    assert open_tower(folder).complete


def test_an_index_and_a_single_file_of_other_values_are_refused(tmp_path):
    folder = random_checkpoint(tmp_path, shards=2)
    random_checkpoint(tmp_path / "stale", seed=1)
    shutil.move(tmp_path / "stale" / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="are the same weight with different values"):
        _ = open_tower(folder).weights


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "less"])
def test_an_index_and_a_single_file_of_other_tensors_are_refused(tmp_path, change):
    folder = random_checkpoint(tmp_path, shards=2)
    tensors = {name: stored.read() for name, stored in Checkpoint(folder).tensors.items()}
    values = tensors.pop(name := "visual.merger.mlp.0.bias")
    changed = {"name": {f"{name}_": values}, "dtype": {name: values.astype(np.float16)}, "shape": {name: values[None]}}
    save_file({**tensors, **changed.get(change, {})}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        _ = open_tower(folder).stored_names


def test_an_index_and_a_single_file_that_agree_are_read_as_the_index_says(tmp_path):
    folder = random_checkpoint(tmp_path, shards=2)
    expected = weights_digest(open_tower(folder).weights)
    save_file(
        {name: stored.read() for name, stored in Checkpoint(folder).tensors.items()}, folder / "model.safetensors"
    )
    weights = open_tower(folder).weights
    assert weights_digest(weights) == expected
    assert {stored.file.name for stored in weights.values()} == {path.name for path in Checkpoint(folder).files}


def test_an_index_that_names_the_single_file_is_fine(copy):
    names = Checkpoint(copy).tensors
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    assert open_tower(copy).complete


@pytest.mark.parametrize("shards", [1, 3])
def test_without_an_index_the_weights_are_in_every_safetensors_file_whatever_its_name(tmp_path, shards):
    folder = random_checkpoint(tmp_path / "indexed", shards=shards)
    expected = weights_digest(open_tower(folder).weights)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        file.rename(folder / f"part-{number}.safetensors")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_text("another layout")
    for other in ("adapter_model.safetensors", "consolidated.safetensors"):
        (folder / other).write_text("something else")
    assert weights_digest(open_tower(folder).weights) == expected


def test_only_the_given_files_are_read(tmp_path):
    folder = random_checkpoint(tmp_path / "model", shards=2)
    expected = weights_digest(open_tower(folder).weights)
    (folder / "model.safetensors").write_text("stale")
    files = sorted(folder.glob("model-*.safetensors"))
    assert weights_digest(tower_of(Checkpoint(folder, files=files)).weights) == expected


def test_a_vision_tensor_in_two_files_must_be_the_same_in_both(tmp_path):
    folder = random_checkpoint(tmp_path, shards=2)
    name, bias = "visual.merger.mlp.0.bias", open_tower(folder).weights["merger.mlp.0.bias"].read()
    index = folder / "model.safetensors.index.json"
    for values in (bias, bias + 1):
        save_file({name: values}, folder / "again.safetensors")
        weight_map = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map={**weight_map, "lm_head.weight": "again.safetensors"})
        if values is bias:
            assert open_tower(folder).complete
    with pytest.raises(CheckpointError, match=r"merger\.mlp\.0\.bias.*are the same weight with different values"):
        _ = open_tower(folder).weights


def test_tensors_that_overlap_are_refused(copy):
    def shift(header):
        one, other = sorted(header, key=lambda name: header[name]["data_offsets"])[:2]
        size = header[one]["data_offsets"][1]
        header[other] = {"dtype": "U8", "shape": [size], "data_offsets": [1, size + 1]}

    edit_header(copy / "model.safetensors", shift)
    with pytest.raises(CheckpointError, match=r"tensors 'visual.* and 'visual.* overlap"):
        _ = Checkpoint(copy).tensors


def test_a_tensor_that_is_named_twice_is_refused(copy):
    weights = copy / "model.safetensors"
    raw = weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    name, entry = next(iter(json.loads(raw[8 : 8 + length]).items()))
    text = raw[8 : 8 + length].rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match="given twice"):
        _ = Checkpoint(copy).tensors


def rewrite(folder, change):
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


BLOCK = "visual.blocks.1."


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("attn.proj.weight_scale", np.float32, "quantised: .*weight_scale' is float32"),
        ("attn.proj.weight_scale_inv", np.float32, "quantised: .*weight_scale_inv'"),
        ("attn.proj.input_scale", np.float32, "quantised: .*input_scale'"),
        ("attn.proj.qweight", np.int32, "quantised: .*qweight' is I32.*packed 4-bit"),
        ("attn.proj.qzeros", np.int32, "quantised: .*qzeros'"),
        ("attn.proj.scales", np.float16, "quantised: .*scales' is float16"),
        ("attn.proj.g_idx", np.int32, "quantised: .*g_idx'"),
        ("attn.proj.biases", np.float16, "quantised: .*biases'"),
        ("attn.proj.weight.absmax", np.float32, "quantised: .*absmax'"),
        ("attn.proj.weight.quant_map", np.float32, "quantised: .*quant_map'"),
        ("attn.proj.weight.quant_state.bitsandbytes__nf4", np.uint8, "quantised: .*bitsandbytes__nf4' is U8"),
        ("attn.proj.weight_packed", np.uint8, "quantised: .*weight_packed' is U8"),
        ("attn.proj.weight_global_scale", np.float32, "quantised: .*weight_global_scale'"),
        ("attn.proj.weight", ml_dtypes.float8_e4m3fn, r"quantised: .*attn\.proj\.weight' is F8_E4M3.*FP8"),
        ("attn.proj.weight", np.uint8, r"quantised: .*attn\.proj\.weight' is U8.*packed 4-bit"),
        ("attn.proj.weight", np.int8, r"quantised: .*attn\.proj\.weight' is I8"),
        ("attn.proj.lora_A.weight", np.float32, "lora_A.* is part of an adapter"),
        ("attn.proj.lora_B.default.weight", np.float32, "lora_B.* is part of an adapter"),
        ("attn.proj.base_layer.weight", np.float32, "base_layer.* is part of an adapter"),
        ("attn.proj.gamma", np.float32, "unknown weight 'visual.*gamma'"),
    ],
)
def test_what_the_tower_cannot_take_is_refused_by_name(copy, name, dtype, message):
    rewrite(copy, lambda tensors: tensors.update({BLOCK + name: np.ones((4, 4), dtype)}))
    tower = open_tower(copy)
    with pytest.raises(CheckpointError, match=message) as refusal:
        _ = tower.complete
    if "quantised" in message:
        assert "unquantised checkpoint of the same model" in refusal.value.hint
    with pytest.raises(CheckpointError, match=message):
        tower.programs(["onnx"])


def test_quantised_language_weights_and_buffers_of_the_tower_are_no_obstacle(copy):
    expected = weights_digest(open_tower(copy).weights)
    others = {
        "language_model.layers.0.mlp.up_proj.qweight": np.ones(4, np.int32),
        "language_model.layers.0.mlp.up_proj.scales": np.ones(4, np.float16),
        "visual.rotary_pos_emb.inv_freq": np.ones(4, np.float32),
    }
    rewrite(copy, lambda tensors: tensors.update(others))
    assert weights_digest(open_tower(copy).weights) == expected


def test_other_architectures_are_refused_with_the_supported_ones(copy):
    edit_json(copy / "config.json", architectures=["LlavaForConditionalGeneration"])
    with pytest.raises(UnsupportedArchitectureError, match=r"Llava.*Supported: .*Qwen2_5_VL"):
        open_tower(copy)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"hidden_act": "gelu"}, UnsupportedArchitectureError, "hidden_act is 'gelu'"),
        ({"num_heads": 5}, CheckpointError, "divisible by heads"),
        ({"num_heads": 0}, CheckpointError, "heads is 0; it must be from 1 to"),
        ({"window_size": 33}, CheckpointError, "window_size is 33; it must be a multiple"),
        ({"window_size": 2**25}, CheckpointError, "window is .*; it must be from 1 to"),
        ({"window_size": 8 * 1024}, CheckpointError, "no more than 16384 patches"),
        ({"depth": None}, CheckpointError, "depth has None where an integer is expected"),
        ({"hidden_size": "wide"}, CheckpointError, "hidden_size has 'wide'"),
        ({"rope_parameters": "fast"}, CheckpointError, "rope_theta cannot be read"),
        ({"rope_parameters": {"rope_theta": 10**400}}, CheckpointError, "rope_theta cannot be read"),
        ({"depth": 3.0}, CheckpointError, r"depth has 3\.0"),
        ({"num_heads": "2"}, CheckpointError, "num_heads has '2'"),
        ({"fullatt_block_indexes": ["1"]}, CheckpointError, "fullatt_block_indexes has '1'"),
        ({"rope_parameters": {"rope_theta": 0}}, CheckpointError, "rotary_base must be positive"),
        ({"depth": float("inf")}, CheckpointError, "depth has inf"),
        ({"fullatt_block_indexes": 3}, CheckpointError, "fullatt_block_indexes is 3 and not a list"),
    ],
)
def test_impossible_configurations_are_refused(copy, change, kind, message):
    vision = json.loads((copy / "config.json").read_text())["vision_config"]
    edit_json(copy / "config.json", vision_config={**vision, **change})
    with pytest.raises(kind, match=message):
        open_tower(copy)


def test_a_text_model_is_refused(copy):
    edit_json(copy / "config.json", vision_config=None)
    with pytest.raises(CheckpointError, match="vision_config is missing"):
        open_tower(copy)


def test_a_checkpoint_without_vision_weights_says_where_to_point_at(copy):
    from safetensors.numpy import load_file, save_file

    others = {f"language_model.{name}": value for name, value in load_file(copy / "model.safetensors").items()}
    save_file(others, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="VISIONACCEL_BUNDLE"):
        open_tower(copy).programs(["onnx"])
