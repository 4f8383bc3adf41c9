"""The written ONNX graph computes the tower, over the checkpoint's own bytes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings

from strategies import grid_lists
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.encoder import open_tower
from visionaccel.errors import CheckpointError
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, TINY, hollow_checkpoint, random_checkpoint, tower_shapes

VARIANTS = [
    ("float32", "visual.", 1),
    ("float32", "model.visual.", 3),
    ("bfloat16", "visual.", 2),
    ("bfloat16", "model.visual.", 1),
    ("float16", "visual.", 1),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint in each stored dtype, prefix and number of shards."""
    dtype, prefix, shards = request.param
    return random_checkpoint(tmp_path_factory.mktemp("variant"), dtype=dtype, prefix=prefix, shards=shards)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    with open_encoder(checkpoint, backend="onnxrt") as encoder:
        yield encoder


@given(triples=grid_lists())
@example(triples=[(1, 58, 74)])
@example(triples=[(1, 2, 2)])
@example(triples=[(4, 10, 6), (1, 8, 8), (4, 10, 6), (1, 20, 2)])
@hypothesis_settings(max_examples=20)
def test_embeddings_equal_transformers(checkpoint, encoder, triples):
    patches = random_patches(triples)
    ours = encoder.encode(patches, triples)
    np.testing.assert_allclose(ours, reference(checkpoint, patches, triples), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "rope",
    [{"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}],
    ids=["beside", "within"],
)
def test_the_rotary_base_is_read_where_transformers_reads_it(tmp_path, rope):
    folder = random_checkpoint(tmp_path, {**TINY, **rope})
    triples = [(1, 20, 18)]
    patches = random_patches(triples)
    with open_encoder(folder, backend="onnxrt") as encoder:
        ours = encoder.encode(patches, triples)
    np.testing.assert_allclose(ours, reference(folder, patches, triples), rtol=0, atol=2e-5)
    with open_encoder(random_checkpoint(tmp_path / "other"), backend="onnxrt") as encoder:
        assert np.abs(encoder.encode(patches, triples) - ours).max() > 1e-3, "the base matters"


def test_the_model_is_valid_onnx_and_holds_no_weight(checkpoint, tmp_path):
    tower = open_tower(checkpoint)
    model = onnx.load_model_from_string(tower.onnx_model())
    for file in checkpoint.iterdir():
        shutil.copy(file, tmp_path)  # onnx looks for external data beside the model and takes no links
    onnx.save_model(model, tmp_path / "tower.onnx")
    onnx.checker.check_model(tmp_path / "tower.onnx", full_check=True)
    assert {opset.domain for opset in model.opset_import} == {"", "com.microsoft"}
    external = [init for init in model.graph.initializer if init.data_location == onnx.TensorProto.EXTERNAL]
    assert len(external) == len(tower_shapes(TINY))
    embedded = sum(len(init.raw_data) for init in model.graph.initializer)
    assert embedded < 1024, "only shapes and indices are embedded"
    named = {entry.value for init in external for entry in init.external_data if entry.key == "location"}
    assert named == {file.name for file in checkpoint.glob("*.safetensors")}


def test_weights_in_several_folders_are_referenced_below_their_common_one(tmp_path):
    real = random_checkpoint(tmp_path / "real", shards=2)
    (tmp_path / "elsewhere").mkdir()
    moved = (real / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere" / "second.safetensors")
    (real / "model-00002-of-00002.safetensors").symlink_to(moved)
    grids = [(1, 6, 10)]
    patches = random_patches(grids)
    with open_encoder(real, backend="onnxrt") as encoder:
        assert encoder.programs[0].program.folder == tmp_path
        np.testing.assert_allclose(encoder.encode(patches, grids), reference(real, patches, grids), rtol=0, atol=2e-5)


def test_a_missing_weight_is_named(tiny, tmp_path):
    from safetensors.numpy import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    del weights["visual.blocks.1.attn.proj.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.proj\.bias"):
        open_tower(tmp_path).onnx_model()


@pytest.mark.parametrize("size", ["intermediate_size", "out_hidden_size"])
def test_weights_of_another_shape_are_refused(tiny, tmp_path, size):
    document = json.loads((tiny / "config.json").read_text())
    document["vision_config"][size] += 4
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "model.safetensors").symlink_to(tiny / "model.safetensors")
    with pytest.raises(CheckpointError, match="the configuration requires"):
        open_tower(tmp_path).onnx_model()


def test_quantized_weights_are_refused(tmp_path):
    folder = random_checkpoint(tmp_path, dtype="float16")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F16"', b'"I16"'))
    with pytest.raises(CheckpointError, match="the vision tower is quantised"):
        open_tower(folder).onnx_model()


def test_the_7b_tower_is_written_in_little_memory(tmp_path):
    folder = hollow_checkpoint(tmp_path, QWEN2_5_VL_7B)
    assert (folder / "model.safetensors").stat().st_size > 2.4 * 2**30
    code = """
import sys
from pathlib import Path
def peak():  # not ru_maxrss, which a child inherits from its parent
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
from visionaccel.encoder import open_tower
model = open_tower(sys.argv[1]).onnx_model()
print(peak() - before, len(model))
"""
    run = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    grown, size = map(int, run.stdout.split())
    assert 0 < grown < 0.5 * 2**30
    assert size < 2**20
