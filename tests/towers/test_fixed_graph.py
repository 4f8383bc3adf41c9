"""Graphs of fixed shapes compute the tower, in standard operators, for the 7B shape too."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given

from strategies import grid_lists
from towers import lowest_cosine, random_patches
from visionaccel import open_encoder
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.grid import Grid, as_grids
from visionaccel.core.program import ONNX, AnyGrid, Bucket, FixedGrid, HostSplit, Program
from visionaccel.encoder import open_tower
from visionaccel.errors import CheckpointError, ConfigurationError, GridError, UnfitGridError
from visionaccel.towers import PatchEmbedding
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, TINY, hollow_checkpoint, random_checkpoint

PRIOR_ART_NODES = 3016
"""Nodes of the published export of the same tower at the same grid, which also took a copy of the weights."""


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_7b_program_for_58x74_is_valid_and_small(tmp_path, precision):
    folder = hollow_checkpoint(tmp_path, QWEN2_5_VL_7B)
    path = folder / "58x74.onnx"  # the checker wants the weights beside the model
    path.write_bytes(open_tower(folder).onnx_model(coverage=FixedGrid(Grid(1, 58, 74)), precision=precision))
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert len(model.graph.node) < PRIOR_ART_NODES


def test_a_program_of_the_7b_towers_blocks_for_58x74_is_right(seven, seven_answer, tmp_path):
    grid = Grid(1, 58, 74)
    bundle = export_bundle(
        open_tower(seven), tmp_path / "bundle", [ProgramRequest(FixedGrid(grid))], self_contained=True,
        precision="bfloat16",
    )  # fmt: skip
    # What is packed in bfloat16 is what the checkpoint holds; the program under test is the float32 one.
    floats = export_bundle(open_tower(bundle.folder), tmp_path / "float32", [ProgramRequest(FixedGrid(grid))])
    (bundle.folder / "float32.onnx").write_bytes((floats.folder / "58x74.onnx").read_bytes())
    for name in ("58x74.onnx", "float32.onnx"):
        onnx.checker.check_model(bundle.folder / name, full_check=True)

    patches, exact = seven_answer
    with open_encoder(floats, backend="onnxrt") as encoder:
        ours = encoder.encode(patches, [grid])
    assert lowest_cosine(ours, exact) > 0.99999


def test_every_window_layer_has_no_mask_and_every_full_one_sees_all(tiny):
    model = onnx.load_model_from_string(open_tower(tiny).onnx_model(coverage=FixedGrid(Grid(1, 10, 18))))
    shaped = onnx.shape_inference.infer_shapes(model)
    sizes = {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim] for info in shaped.graph.value_info}
    scores = Counter(tuple(sizes[node.input[0]]) for node in model.graph.node if node.op_type == "Softmax")
    # 10x18 patches in windows of 8x8: two whole, two of 2 rows, one of 2 columns, and a corner.
    windows, full = {(2, 2, 64, 64): 2, (2, 3, 16, 16): 2, (2, 1, 4, 4): 2}, {(2, 180, 180): 1}
    assert scores == Counter(windows | full)
    assert all(size > 0 for shape in sizes.values() for size in shape), "every shape is known"


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_weights_and_activations_have_the_precision_and_the_edges_are_float32(tiny, precision):
    tower = open_tower(tiny)
    model = onnx.load_model_from_string(tower.onnx_model(coverage=FixedGrid(Grid(1, 8, 8)), precision=precision))
    kinds = {
        "float32": onnx.TensorProto.FLOAT,
        "bfloat16": onnx.TensorProto.BFLOAT16,
        "float16": onnx.TensorProto.FLOAT16,
    }
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    products = [types[node.output[0]] for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    assert set(products) == {kinds[precision]}
    softmax = {types[node.output[0]] for node in model.graph.node if node.op_type == "Softmax"}
    edges = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert softmax == edges == {onnx.TensorProto.FLOAT}


def test_an_encoder_of_fixed_programs_refuses_other_grids_and_names_its_own(tiny, tmp_path):
    requests = [ProgramRequest(FixedGrid(Grid(1, 8, 12)))]
    bundle = export_bundle(open_tower(tiny), tmp_path / "bundle", requests)
    with open_encoder(bundle, backend="onnxrt") as encoder:
        with pytest.raises(UnfitGridError, match=r"accepts grid 1x12x8; accepted grids: 8x12"):
            encoder.encode(random_patches([(1, 12, 8)]), [(1, 12, 8)])
        assert len(encoder.encode(random_patches([(3, 8, 12)]), [(3, 8, 12)])) == 3 * 24


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"coverage": AnyGrid(), "host": HostSplit("raster")}, ConfigurationError, "only programs of fixed shapes"),
        ({"host": HostSplit("sideways")}, ConfigurationError, "do not support the token order 'sideways'"),
        (
            {"coverage": Bucket({"patches": 64, "windows": 2}), "host": HostSplit("grouped")},
            ConfigurationError,
            "do not support the token order 'grouped'",
        ),
        ({"coverage": FixedGrid(Grid(2, 8, 8))}, ConfigurationError, "encodes one frame, but 2x8x8 has 2"),
        ({"coverage": FixedGrid(Grid(1, 7, 8))}, GridError, "divisible by the merge size"),
        ({"coverage": Bucket({"patches": 63, "windows": 1})}, ConfigurationError, "63 patches are not a whole number"),
        (
            {"coverage": Bucket({"patches": 64})},
            ConfigurationError,
            "needs sizes for patches and windows, not patches",
        ),
        ({"coverage": Bucket({"patches": 64, "windows": 4, "tokens": 16})}, ConfigurationError, "windows and tokens"),
        ({"coverage": Bucket({"patches": 64, "windows": 0})}, ConfigurationError, "0 windows do not fit"),
        ({"coverage": Bucket({"patches": 64, "windows": 5})}, ConfigurationError, "64 patches form 1 to 4"),
        ({"dialect": "nvidia"}, ConfigurationError, "unknown dialect 'nvidia'"),
        ({"precision": "float64"}, ConfigurationError, "unknown precision 'float64'"),
        ({"folder": Path("/nowhere")}, ConfigurationError, "/nowhere does not contain the weights"),
    ],
)
def test_what_cannot_be_written_is_refused(tiny, asked, error, said):
    tower = open_tower(tiny)
    with pytest.raises(error, match=said):
        tower.onnx_model(**{"coverage": FixedGrid(Grid(1, 8, 8)), **asked})


@given(triples=grid_lists())
def test_a_bucket_of_any_frame_may_be_written(tiny, triples):
    tower = open_tower(tiny)
    for grid in as_grids(triples):
        tower.check_program(tower.bucket(grid), None)


def test_a_bucket_pads_tensors_too(tiny):
    torch = pytest.importorskip("torch")
    tower, grid = open_tower(tiny), Grid(1, 8, 12)
    coverage = tower.bucket(Grid(1, 16, 16))
    inputs, outputs = tower.signature(coverage, None)
    host = tower.host(Program("p", tower.family, ONNX, tiny, inputs, outputs, {}, True, coverage))
    patches = random_patches([grid.thw])
    given, expected = (host.inputs(each, [grid])["pixel_values"] for each in (torch.from_numpy(patches), patches))
    assert isinstance(given, torch.Tensor)
    np.testing.assert_array_equal(given.numpy(), expected)


@pytest.mark.parametrize("use_torch", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16"])
def test_the_hosts_patch_embedding_is_the_convolution(given, use_torch):
    import ml_dtypes
    import torch

    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((32, 3, 2, 4, 4), dtype=np.float32) / 10
    patches = rng.standard_normal((24, 96), dtype=np.float32).astype(getattr(ml_dtypes, given, None) or given)
    order = rng.permutation(6)
    blocks = torch.from_numpy(patches.astype(np.float32).reshape(-1, 3, 2, 4, 4))
    exact = torch.nn.functional.conv3d(blocks, torch.from_numpy(kernel), stride=(2, 4, 4)).numpy().reshape(6, 4, 32)
    for precision, tolerance in (("float32", 1e-5), ("float16", 1e-5), ("bfloat16", 2e-2)):
        if use_torch and precision == "bfloat16" and not has_bfloat16():
            continue  # it is numpy that embeds on such a processor
        embedding = PatchEmbedding(kernel.reshape(32, -1), precision, 4, use_torch=use_torch)
        ours = embedding(patches, order)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, exact[order], rtol=0, atol=tolerance)


def test_numpy_and_torch_round_alike_in_bfloat16():
    if not has_bfloat16():
        pytest.skip("this CPU has no bfloat16 arithmetic that torch uses")
    rng = np.random.default_rng(1)
    weight, patches = rng.standard_normal((32, 96), np.float32), rng.standard_normal((24, 96), np.float32)
    numpy, torch = (
        PatchEmbedding(weight, "bfloat16", 4, use_torch=use)(patches, np.arange(6)) for use in (False, True)
    )
    assert (numpy == torch).mean() > 0.99
    np.testing.assert_allclose(numpy, torch, rtol=2**-7, atol=1e-6)


def test_a_split_program_without_its_host_weight_is_refused(tmp_path):
    tower, coverage = open_tower(random_checkpoint(tmp_path, TINY)), FixedGrid(Grid(1, 8, 8))
    split = tower.split(coverage)
    inputs, outputs = tower.signature(coverage, split)
    program = Program("p", tower.family, ONNX, tmp_path, inputs, outputs, {}, True, coverage, host=split)
    (name,) = tower.host_weights
    weights = dict(tower.weights)
    with pytest.raises(CheckpointError, match=r"is float32\[32\], but the configuration requires \[32, 3, 2, 4, 4\]"):
        tower.over({**weights, name: weights["merger.ln_q.weight"]})
    del weights[name]
    with pytest.raises(CheckpointError, match="is missing"):
        tower.over(weights).host(program)


def test_many_grids_are_written_without_reading_a_weight(tmp_path):
    tower = open_tower(hollow_checkpoint(tmp_path, QWEN2_5_VL_7B))
    sizes = {(h, w): len(tower.onnx_model(coverage=FixedGrid(Grid(1, h, w)))) for h, w in [(58, 74), (74, 58), (2, 2)]}
    assert max(sizes.values()) < 5 * 2**20, "tables and nothing else"
