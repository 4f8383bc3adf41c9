"""A description alone makes every program: towers of families that the project does not ship are transformers' own."""

from contextlib import closing

import numpy as np
import onnx
import onnxruntime
import pytest

from described import CASES, described_reference, described_tower
from visionaccel import open_encoder
from visionaccel.backends import default_registry
from visionaccel.backends.sessions import open_session
from visionaccel.core.grid import Grid, as_grids, total_patches
from visionaccel.core.program import CHECKPOINT, ONNX, ONNX_STANDARD, AnyGrid, FixedGrid, Program
from visionaccel_bench.encode.operations import count_operations

GRIDS = [(1, 4, 4), (2, 12, 10), (1, 26, 18), (1, 2, 34)]
GRID, LARGEST = Grid(1, 10, 14), Grid(1, 12, 16)


@pytest.fixture(scope="module", params=CASES)
def described(request, tmp_path_factory):
    """A family's name, its tower, and transformers'."""
    tower, theirs = described_tower(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, tower, theirs


def patches_of(tower, grids):
    rng = np.random.default_rng(0)
    return rng.standard_normal((total_patches(as_grids(grids)), tower.patch_width), dtype=np.float32)


def compare(described, ours, patches, grids):
    name, tower, theirs = described
    exact = described_reference(name, theirs, patches, grids)
    assert ours.shape == exact.shape == (len(exact), tower.out_width)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5 * np.abs(exact).max())


def test_names_and_shapes_of_all_weights_are_the_descriptions(described):
    _, tower, _ = described
    assert {name: tensor.shape for name, tensor in tower.weights.items()} == dict(tower.spec.shapes())
    assert tower.complete


@pytest.mark.parametrize("backend", ["torch_ref", "onnxrt", "openvino"])
def test_every_backend_encodes_any_grids(described, backend):
    patches = patches_of(described[1], GRIDS)
    with open_encoder(described[1], backend=backend) as encoder:
        compare(described, np.asarray(encoder.encode(patches, GRIDS), np.float32), patches, GRIDS)


@pytest.mark.parametrize("shape", ["fixed", "bucket"])
@pytest.mark.parametrize("form", ["standard", "microsoft", "split"])
def test_every_program_of_fixed_shapes_is_the_tower(described, tmp_path, shape, form):
    _, tower, _ = described
    coverage = FixedGrid(GRID) if shape == "fixed" else tower.bucket(LARGEST)
    split = tower.split(coverage) if form == "split" else None
    dialect = "microsoft" if form == "microsoft" else "standard"
    model = tower.onnx_model(coverage=coverage, host=split, dialect=dialect)
    inputs, outputs = tower.signature(coverage, split)
    program = Program("p", tower.family, ONNX, tmp_path, inputs, outputs, {}, True, coverage, host=split)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    folder = str(tower.weights_folder)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = onnxruntime.InferenceSession(model, options)
    host, patches = tower.host(program), patches_of(tower, [GRID.thw])
    fed = dict(host.inputs(patches, [GRID]))
    assert set(fed) == {spec.name for spec in inputs}
    names = [spec.name for spec in outputs]
    given = dict(zip(names, session.run(names, fed), strict=True))
    compare(described, host.embeddings(given, [GRID]), patches, [GRID.thw])


@pytest.mark.parametrize("backend", ["onnxrt", "openvino"])
def test_the_standard_dialect_needs_no_windows(described, backend):
    _, tower, _ = described
    (program,) = tower.programs([ONNX_STANDARD])
    host, chosen, grids = tower.host(program), default_registry().load(backend), [Grid(2, 10, 14), GRID]
    patches = patches_of(tower, grids)
    with closing(open_session(chosen, program, None, chosen.options())) as session:
        outputs = session.run(host.inputs(patches, grids))
        compare(described, host.embeddings(outputs, grids), patches, [grid.thw for grid in grids])


def test_the_standard_dialect_is_valid(described, tmp_path):
    _, tower, _ = described
    model = tower.onnx_model(coverage=AnyGrid(), dialect="standard")
    path = tower.weights_folder / "standard.onnx"
    path.write_bytes(model)
    onnx.checker.check_model(path, full_check=True)
    assert {opset.domain for opset in onnx.load_model_from_string(model).opset_import} == {""}
    path.unlink()


def test_operations_are_counted_from_the_description(described):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    name, tower, theirs = described
    grids = [(1, 10, 14), (1, 4, 8)]
    patches = patches_of(tower, grids)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        described_reference(name, theirs, patches, grids)
    counted = count_operations(tower.spec, as_grids(grids)).total
    assert counted == pytest.approx(counter.get_total_flops(), rel=0 if name != "glm4v" else 0.01)


def test_the_program_of_the_weights_brings_the_description(described):
    _, tower, _ = described
    (program,) = tower.programs([CHECKPOINT])
    assert program.spec == tower.spec
