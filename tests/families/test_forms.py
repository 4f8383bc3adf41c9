"""Every form of a program of every family computes the family's tower, on every backend that runs the form."""

import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import Qwen2VLImageProcessor

from simulated import simulated_program
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.bundle import ProgramRequest, export_bundle, strip_checkpoint, tower_digest
from visionaccel.checkpoint import Checkpoint
from visionaccel.core.grid import Grid
from visionaccel.core.program import ONNX, ONNX_STANDARD, PATCH_EMBEDDINGS, AnyGrid, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.validation import quantize_bundle, validate_bundle
from visionaccel_flexmlrt import FlexMLRTBackend
from visionaccel_flexmlrt.backend import FlexMLRTOptions
from visionaccel_testing.checkpoints import TINY_TOWERS, random_checkpoint

FIXED, BUCKET, ANY = [(1, 10, 18)], [(1, 6, 10)], [(2, 20, 14), (1, 2, 34), (1, 4, 4)]
COVERED = FixedGrid(Grid(1, 10, 18))


@dataclass
class Case:
    """A tower of a family, and the embeddings that transformers makes.

    It has no class of dots.ocr: those are of `torch_ref`, which another test compares with vLLM's tower.
    """

    folder: Path
    config: dict[str, Any]
    family: str

    def patches(self, grids):
        return random_patches(grids, self.config)

    def exact(self, grids):
        if self.family != "dots_ocr":
            return reference(self.folder, self.patches(grids), grids)
        with open_encoder(self.folder, backend="torch_ref", isolation="none") as encoder:
            return np.asarray(encoder.encode(self.patches(grids), grids))

    def requests(self, *, split=False, dialect=None):
        fixed, bucket = COVERED, open_tower(self.folder).bucket(Grid(1, 14, 22))
        found = [ProgramRequest(coverage, split, dialect) for coverage in (fixed, bucket)]
        return found if split else [*found, ProgramRequest(AnyGrid(), dialect=dialect)]

    def compare(self, ours, grids, tolerance=1e-5):
        exact = self.exact(grids)
        assert ours.shape == exact.shape == (len(exact), open_tower(self.folder).out_width)
        assert np.abs(ours - exact).max() <= tolerance * np.abs(exact).max()


@pytest.fixture(scope="module", params=TINY_TOWERS)
def case(request, tmp_path_factory):
    config = TINY_TOWERS[request.param]
    folder = random_checkpoint(tmp_path_factory.mktemp(request.param) / "checkpoint", family=request.param)
    processor = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=config["temporal_patch_size"], min_pixels=64, max_pixels=96**2
    )
    processor.save_pretrained(folder)
    return Case(folder, config, request.param)


@pytest.fixture(scope="module")
def standard(case, tmp_path_factory):
    """A bundle of programs in standard operators: a fixed grid, a bucket and any grid."""
    folder = tmp_path_factory.mktemp("standard") / "bundle"
    return export_bundle(open_tower(case.folder), folder, case.requests(dialect="standard"))


@pytest.fixture(scope="module")
def fused(case, tmp_path_factory):
    """A bundle of the same programs in ONNX Runtime's operators."""
    folder = tmp_path_factory.mktemp("fused") / "bundle"
    return export_bundle(open_tower(case.folder), folder, case.requests(dialect="microsoft"))


@pytest.fixture(scope="module")
def split(case, tmp_path_factory):
    """A bundle of a fixed grid and a bucket whose patches the host embeds."""
    folder = tmp_path_factory.mktemp("split") / "bundle"
    return export_bundle(open_tower(case.folder), folder, case.requests(split=True))


@pytest.mark.parametrize(
    ("form", "backend"),
    [
        ("standard", "onnxrt"),
        ("standard", "openvino"),
        ("fused", "onnxrt"),
        ("split", "onnxrt"),
        ("split", "openvino"),
    ],
)
def test_every_form_computes_the_tower(request, case, form, backend, ran):
    bundle = request.getfixturevalue(form)
    with open_encoder(bundle, backend=backend, isolation="none") as encoder:
        assert len(encoder.programs) == len(bundle.manifest.programs)
        for grids in (FIXED, BUCKET) if form == "split" else (FIXED, BUCKET, ANY):
            case.compare(np.asarray(encoder.encode(case.patches(grids), grids)), grids)
    ran(case.family, backend, *(["split"] if form == "split" else ["fixed grid", "bucket", "any grid"]))


def test_a_program_for_any_grid_is_valid_onnx(case, standard):
    path = case.folder / "any.onnx"  # the checker wants the weights next to the model
    path.write_bytes(open_tower(case.folder).onnx_model(dialect="standard"))
    onnx.checker.check_model(path, full_check=True)
    assert {opset.domain for opset in onnx.load_model(path, load_external_data=False).opset_import} == {""}
    path.unlink()


def test_of_a_split_program_the_host_embeds_patches_and_adds_positions(split):
    held_by_host = set(split.tower.host_weights)
    for program in split.programs([ONNX]):
        stored = {tensor.name for tensor in onnx.load_model_from_string(program.model()).graph.initializer}
        assert not stored & held_by_host
        given = {tensor.name for tensor in program.inputs}
        assert PATCH_EMBEDDINGS in given
        assert not {name for name in given if name.startswith("position")}
    assert stored & set(split.tower.weights)


def test_the_simulated_npu_runs_split_programs(case, tmp_path, ran):
    tower, grids = open_tower(case.folder), [Grid(1, 10, 18)]
    program = simulated_program(tower, tmp_path, grids[0])
    host = tower.host(program)
    with closing(FlexMLRTBackend().open(program, "simulator", FlexMLRTOptions())) as session:
        outputs = session.run(host.inputs(case.patches(FIXED), grids))
    case.compare(host.embeddings(outputs, grids), FIXED)
    ran(case.family, "flexmlrt", "split, simulated")


def test_a_self_contained_bundle_in_bfloat16_runs_in_a_child_process(case, tmp_path, ran):
    tower = open_tower(case.folder)
    bundle = export_bundle(tower, tmp_path / "b", case.requests()[:1], self_contained=True, precision="bfloat16")
    held, stored = ({tensor.name for tensor in each.weights.values()} for each in (bundle.tower, tower))
    assert held == stored
    with open_encoder(bundle, backend="onnxrt", isolation="process") as encoder:
        case.compare(np.asarray(encoder.encode(case.patches(FIXED), FIXED)), FIXED, 0.05)
    ran(case.family, "onnxrt", "fixed grid in bfloat16")


def test_every_form_passes_validation_against_transformers(case, standard, caplog):
    with caplog.at_level(logging.WARNING):
        found = validate_bundle(standard, open_tower(case.folder), backend="onnxrt", isolation="none")
    assert found.certificate.passed
    assert min(result.lowest_cosine for result in found.certificate.programs) > 0.99999
    assert ("The reference is visionaccel's own" in caplog.text) is (case.family == "dots_ocr")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of two small images of coarse noise."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number, (rows, columns) in enumerate([(10, 15), (18, 10)]):
        pixels = np.kron(rng.integers(0, 256, (rows, columns, 3)), np.ones((4, 4, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("target", ["onnxrt", "openvino"])
def test_programs_are_quantised(case, images, tmp_path, target, ran):
    dialect = "microsoft" if target == "onnxrt" else "standard"
    requests = [ProgramRequest(AnyGrid(), dialect=dialect)]
    bundle = export_bundle(open_tower(case.folder), tmp_path / "float32", requests)
    quantised = quantize_bundle(bundle, tmp_path / "int8", [images], target=target)
    assert quantised.manifest.certificate.passed
    ran(case.family, target, "any grid in int8")
    (program,) = quantised.programs([ONNX, ONNX_STANDARD])
    model = onnx.load_model_from_string(program.model())
    integers = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    weights, last = bundle.tower.weights, bundle.tower.spec.merger[-1]
    matrices = {name for name, weight in weights.items() if len(weight.shape) == 2} - set(bundle.tower.host_weights)
    others = {name for name in matrices if not {f"{name}_quantized", f"{name}.int8"} & integers}
    assert others == (set() if target == "onnxrt" else {f"{getattr(last, 'down', last).name}.weight"})


def test_vision_weights_are_stripped(case, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    for file in case.folder.iterdir():
        (whole / file.name).write_bytes(file.read_bytes())
    weights = load_file(whole / "model.safetensors")
    save_file({**weights, "lm_head.weight": np.ones((2, 2), np.float32)}, whole / "model.safetensors")
    report = strip_checkpoint(Checkpoint(whole), tmp_path / "stripped")
    assert set(Checkpoint(tmp_path / "stripped").tensors) == {"lm_head.weight"}
    assert report.removed_tensors == len(weights)
    assert report.vision_weights_digest == tower_digest(open_tower(case.folder))
