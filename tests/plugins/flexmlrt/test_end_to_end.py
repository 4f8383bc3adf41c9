"""From a checkpoint to verified programs on the simulator, by the commands that users type."""

import json
from functools import partial

import numpy as np
import pytest
from test_import_vitisai import edit
from test_import_vitisai_refusals import _add, _norm
from typer.testing import CliRunner

from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.bundle import open_bundle
from visionaccel.cli.app import app
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError, DeviceError
from visionaccel_flexmlrt.commands import app as tools
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_flexmlrt.vitisai import ImportRequest, import_vitisai
from visionaccel_flexmlrt.vitisai.writing import write_vitisai_folder

LANDSCAPE, PORTRAIT = Grid(1, 12, 20), Grid(1, 20, 12)
float32 = partial(compile_partition, precision="float32")


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Artifacts of two orientations in two layouts, by the tool."""
    root = tmp_path_factory.mktemp("compiled")
    for name, grid, layout in (("landscape", "12x20", "rai"), ("portrait", "20x12", "directory")):
        arguments = ("--grid", grid, "--layout", layout, "--precision", "float32")
        assert "SIMULATOR" in run(tools, "simulate", tiny, root / name, *arguments)
    return root / "landscape", root / "portrait"


@pytest.fixture(scope="module")
def bundle(tiny, folders, tmp_path_factory):
    """One bundle of both orientations."""
    target = tmp_path_factory.mktemp("imported") / "bundle"
    run(app, "import-vitisai", *folders, target, "--checkpoint", tiny, "--precision", "float32")
    return target


def test_several_artifacts_become_one_bundle(bundle):
    programs = open_bundle(bundle).manifest.programs
    assert [(p.name, p.format, p.device) for p in programs] == [
        ("12x20", "flexmlrt.rai", "simulator"),
        ("20x12", "flexmlrt.directory", "simulator"),
    ]


def test_both_orientations_are_right_each_in_a_process_of_its_own(bundle, tiny):
    grids = [(1, 12, 20), (1, 20, 12), (2, 12, 20)]
    patches = random_patches(grids)
    with open_encoder(bundle, backend="flexmlrt", device="simulator") as encoder:
        np.testing.assert_allclose(encoder.encode(patches, grids), reference(tiny, patches, grids), atol=5e-5)
        assert encoder.capabilities.simulated


def test_two_programs_in_one_process_are_refused(bundle):
    with pytest.raises(DeviceError, match="has a FlexMLRT model already"):
        open_encoder(bundle, backend="flexmlrt", device="simulator", isolation="none")


def test_two_artifacts_of_one_grid_are_refused(tiny, folders, tmp_path):
    twice = [ImportRequest(folders[0]), ImportRequest(folders[0])]
    with pytest.raises(ConfigurationError, match="both for grid 12x20"):
        import_vitisai(open_tower(tiny), twice, tmp_path / "bundle")


def test_the_certificate_says_that_it_was_a_simulator(bundle, tiny):
    said = run(app, "validate", bundle, "--reference", tiny, "--backend", "flexmlrt", "--device", "simulator", "--json")
    certificate = json.loads(said)["certificate"]
    assert certificate["passed"]
    assert [(p["device"], p["simulated"]) for p in certificate["programs"]] == [("simulator", True)] * 2
    assert min(p["lowest_cosine"] for p in certificate["programs"]) > 0.99999
    assert '"simulated": true' in run(app, "inspect", bundle, "--json")


def test_a_self_contained_import_validates_with_the_host_s_weight_alone(tiny, folders, tmp_path):
    target = tmp_path / "bundle"
    run(app, "import-vitisai", folders[0], target, "--checkpoint", tiny, "--precision", "float32", "--self-contained")
    said = run(app, "validate", target, "--reference", tiny, "--backend", "flexmlrt", "--device", "simulator", "--json")
    assert json.loads(said)["certificate"]["passed"]


def test_without_the_simulator_s_name_nothing_runs(bundle):
    said = CliRunner().invoke(app, ["explain", str(bundle), "--backend", "flexmlrt", "--json"])
    assert said.exit_code == 1
    assert "made for device 'simulator'" in json.loads(said.stdout)["candidates"][0]["why"]


def test_doctor_names_the_artifacts(bundle):
    said = CliRunner().invoke(app, ["doctor", str(bundle), "--backend", "flexmlrt", "--no-vllm", "--json"])
    assert said.exit_code == 1  # this machine has no NPU
    rows = json.loads(said.stdout)["findings"]
    found = [row["found"] for row in rows if row["what"].startswith("artifact")]
    assert len(found) == 2
    assert all("made for the SIMULATOR" in text for text in found)


@pytest.mark.parametrize("layout", ["rai", "directory"])
def test_a_host_part_that_is_not_known_runs_on_onnx_runtime_where_allowed(tiny, tmp_path, layout):
    import onnxruntime

    folder, tower = tmp_path / "folder", open_tower(tiny)
    write_vitisai_folder(tower, folder, PORTRAIT, layout=layout, compile=float32, metadata=True)
    edit(folder, _add)
    edit(folder, _norm)
    request = ImportRequest(folder, precision="float32", host_on_onnxrt=True, grid=PORTRAIT)
    bundle = import_vitisai(tower, [request], tmp_path / "bundle").bundle
    patches = random_patches([(1, 20, 12)])
    exact = onnxruntime.InferenceSession(folder / "vision.onnx").run(None, {"pixel_values": patches})[0]
    with open_encoder(bundle, backend="flexmlrt", device="simulator") as encoder:
        assert encoder.programs[0].program.coverage == FixedGrid(PORTRAIT)
        np.testing.assert_allclose(encoder.encode(patches, [PORTRAIT]), exact, atol=2e-5)
