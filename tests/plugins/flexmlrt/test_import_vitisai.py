"""Artifacts of AMD's Vitis AI compiler become bundles: of the right grid and weights, computing the tower."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from bundles import document, write_bundle
from strategies import grids
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.bundle import open_bundle, strip_checkpoint
from visionaccel.checkpoint import Checkpoint, differing_weights
from visionaccel.cli.app import app
from visionaccel.core.grid import Grid
from visionaccel.core.program import CHECKPOINT, ONNX, PIXELS, FixedGrid, HostSplit, Program
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError, ConfigurationError, UnsupportedArchitectureError
from visionaccel.families import tower_of
from visionaccel.towers import make_tables
from visionaccel_flexmlrt.artifact import FLEXMLRT_DIRECTORY, FLEXMLRT_RAI, SIMULATOR_MAGIC
from visionaccel_flexmlrt.vitisai import ImportRequest
from visionaccel_flexmlrt.vitisai import import_vitisai as import_artifact
from visionaccel_flexmlrt.vitisai.writing import DEVICE_INPUT, DEVICE_OUTPUT, EMBEDDINGS, write_vitisai_folder
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, hollow_checkpoint, random_checkpoint

PORTRAIT, LANDSCAPE = Grid(1, 20, 12), Grid(1, 12, 20)
"""Both have windows of four sizes, so that raster and grouped order differ."""

PUBLISHED = {
    DEVICE_INPUT: "/blocks/Gather_output_0",
    DEVICE_OUTPUT: "/merger/merger/mlp/mlp.2/Gemm_output_0",
}
"""Names of tensors in the published artifact, in the place of ours."""

FORMATS = {"rai": FLEXMLRT_RAI, "directory": FLEXMLRT_DIRECTORY}


def keep(place):
    """A compiler that compiles nothing: it keeps the partition as ONNX, and writes an artifact that says so."""

    def run(model, target):
        place.mkdir(parents=True, exist_ok=True)
        for file in model.parent.iterdir():
            shutil.copy(file, place / file.name)
        target.write_bytes(SIMULATOR_MAGIC + bytes(2_000_000))

    return run


def folder_of(checkpoint, folder, grid=PORTRAIT, layout="rai", **settings):
    """A compiler's folder for a checkpoint; the partition stays beside it."""
    tower = open_tower(checkpoint)
    write_vitisai_folder(
        tower, folder, grid, layout=layout, compile=keep(folder.with_name(f"{folder.name}_partition")), **settings
    )
    return folder


def imported(checkpoint, folder, output, *, self_contained=False, **request):
    """The bundle of a folder."""
    requests = [ImportRequest(folder, **request)]
    return import_artifact(open_tower(checkpoint), requests, output, self_contained=self_contained).bundle


def edit(folder, change):
    """Change the model that was compiled, its weights where they are."""
    (path,) = folder.glob("*.onnx")
    model = onnx.load_model(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())


def rename(folder, names):
    """Give tensors of the model and of the compiler's table other names."""

    def change(graph):
        for node in graph.node:
            for tensors in (node.input, node.output):
                tensors[:] = [names.get(tensor, tensor) for tensor in tensors]
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.name = names.get(value.name, value.name)

    edit(folder, change)
    for table in folder.glob("flexmlrt-hsi.json"):
        text = table.read_text()
        for old, new in names.items():
            text = text.replace(json.dumps(old), json.dumps(new))
        table.write_text(text)


def node_of(graph, kind, which=0):
    return [node for node in graph.node if node.op_type == kind][which]


def constant_of(graph, name):
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def replace(graph, node, *replacements):
    """Put nodes in the place of another."""
    place = list(graph.node).index(node)
    after = list(graph.node)[place + 1 :]
    del graph.node[place:]
    graph.node.extend([*replacements, *after])


def run_partition(folder, inputs):
    session = onnxruntime.InferenceSession(folder.with_name(f"{folder.name}_partition") / "partition.onnx")
    (output,) = session.get_outputs()
    return {output.name: session.run([output.name], inputs)[0]}


@pytest.mark.parametrize("grid", [PORTRAIT, LANDSCAPE, Grid(1, 6, 4), Grid(1, 18, 10)], ids=str)
def test_a_split_program_in_raster_order_computes_the_tower(tiny, grid):
    tower, coverage, split = open_tower(tiny), FixedGrid(grid), HostSplit("raster")
    inputs, outputs = tower.signature(coverage, split)
    program = Program("p", tower.family, ONNX, tiny, inputs, outputs, tower.weights, True, coverage, host=split)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tiny))
    session = onnxruntime.InferenceSession(tower.onnx_model(tiny, coverage=coverage, host=split), options)
    patches = random_patches([(1, grid.h, grid.w)])
    host = tower.host(program)
    found = session.run(None, dict(host.inputs(patches, [grid])))
    with open_encoder(tiny, backend="onnxrt") as encoder:
        exact = encoder.encode(patches, [grid])
    ours = host.embeddings({outputs[0].name: found[0]}, [grid])
    np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("window_order", ["raster", "grouped"])
@pytest.mark.parametrize("layout", ["rai", "directory"])
def test_an_imported_program_with_the_hosts_part_computes_the_tower(tiny, tmp_path, layout, window_order):
    folder = folder_of(tiny, tmp_path / "folder", layout=layout, window_order=window_order)
    bundle = imported(tiny, folder, tmp_path / "bundle", precision="float32")
    (program,) = bundle.programs([FORMATS[layout]])
    assert program.coverage == FixedGrid(PORTRAIT)
    assert program.host == HostSplit(window_order)
    assert (program.device, program.precision) == ("simulator", "float32")
    assert program.artifact.name == {"rai": "vision.rai", "directory": "partition-info.json"}[layout]
    patches = random_patches([(1, 20, 12)])
    host = bundle.tower.host(program)
    fed = {program.stored_names[name]: array for name, array in host.inputs(patches, [PORTRAIT]).items()}
    named = {stored: name for name, stored in program.stored_names.items()}
    given = {named[name]: array for name, array in run_partition(folder, fed).items()}
    with open_encoder(tiny, backend="onnxrt") as encoder:
        exact = encoder.encode(patches, [PORTRAIT])
    np.testing.assert_allclose(host.embeddings(given, [PORTRAIT]), exact, rtol=0, atol=2e-5)


def test_the_names_of_the_devices_tensors_are_the_artifacts_own(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder", metadata=True)
    rename(folder, {PIXELS: "x", DEVICE_INPUT: "edge/in", DEVICE_OUTPUT: "edge/out", EMBEDDINGS: "y"})
    for suffix in ("rai", "onnx"):
        (folder / f"vision.{suffix}").rename(folder / f"model.{suffix}")
    (program,) = imported(tiny, folder, tmp_path / "bundle").programs([FLEXMLRT_RAI])
    assert program.stored_names == {"patch_embeddings": "edge/in", "window_embeddings": "edge/out"}


def test_a_directory_is_taken_whole_and_keeps_its_paths(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder", layout="directory")
    (folder / "vision_cache" / "vaiml_par_0" / "0" / "aie.bin").write_bytes(b"x" * 10)
    bundle = imported(tiny, folder, tmp_path / "bundle")
    (entry,) = bundle.manifest.programs
    home = "20x12/vaiml_par_0"
    assert {file.path for file in entry.files} == {
        f"{home}/partition-info.json", f"{home}/simulator.rai", f"{home}/0/flexmlrt-hsi.json", f"{home}/0/aie.bin",
    }  # fmt: skip
    assert entry.model == f"{home}/partition-info.json"


def test_an_artifact_without_the_simulators_magic_is_the_npus(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder")
    (folder / "vision.rai").write_bytes(bytes(2_000_000))
    result = import_artifact(open_tower(tiny), [ImportRequest(folder)], tmp_path / "bundle")
    assert [program.device for program in result.bundle.manifest.programs] == ["npu"]
    assert not result.warnings


def test_a_rai_is_linked_and_not_copied_where_the_disk_allows(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder")
    imported(tiny, folder, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "20x12" / "vision.rai").samefile(folder / "vision.rai")


@pytest.mark.parametrize("window_order", ["raster", "grouped"])
@pytest.mark.parametrize("grid", [PORTRAIT, LANDSCAPE], ids=["portrait", "landscape"])
def test_portrait_and_landscape_are_told_apart(tiny, tmp_path, grid, window_order):
    folder = folder_of(tiny, tmp_path / "folder", grid, window_order=window_order)
    bundle = imported(tiny, folder, tmp_path / "bundle")
    assert bundle.grids == (grid,)
    other = {PORTRAIT: LANDSCAPE, LANDSCAPE: PORTRAIT}[grid]
    with pytest.raises(ConfigurationError, match=rf"not for grid {other.h}x{other.w}"):
        imported(tiny, folder, tmp_path / "other", grid=other)


def test_a_tower_with_a_norm_after_its_patch_embedding_has_no_such_artifact(tmp_path):
    tower = open_tower(random_checkpoint(tmp_path / "glm", family="glm4v"))
    with pytest.raises(UnsupportedArchitectureError, match="has a norm after its patch embedding"):
        write_vitisai_folder(tower, tmp_path / "out", Grid(1, 6, 10), layout="rai", compile=lambda *_: None)


def test_both_orientations_of_the_published_geometry_are_told_apart(tmp_path):
    shallow = {**QWEN2_5_VL_7B, "depth": 2, "fullatt_block_indexes": [1]}  # blocks are not looked at
    checkpoint = hollow_checkpoint(tmp_path / "7b", shallow)
    for grid, fifth in ((Grid(1, 58, 74), 37), (Grid(1, 74, 58), 29)):
        folder = tmp_path / f"{grid}"
        write_vitisai_folder(
            open_tower(checkpoint),
            folder,
            grid,
            layout="rai",
            compile=lambda _, file: file.write_bytes(SIMULATOR_MAGIC),
        )
        graph = onnx.load_model(folder / "vision.onnx", load_external_data=False).graph
        index = numpy_helper.to_array(constant_of(graph, "window_index"))
        assert (len(index), index[4]) == (1073, fifth)
        result = import_artifact(open_tower(checkpoint), [ImportRequest(folder)], folder / "bundle")
        assert result.bundle.grids == (grid,)
        (program,) = result.bundle.programs([FLEXMLRT_RAI])
        assert [str(spec) for spec in (*program.inputs, *program.outputs)] == [
            "patch_embeddings: float32[1073, 4, 1280]", "window_embeddings: float32[1073, 3584]",
        ]  # fmt: skip


@settings(max_examples=25)
@given(frame=grids(most_frames=1))
def test_the_importer_finds_the_grid_that_a_folder_was_made_for_or_asks(tiny, tmp_path, frame):
    grid = Grid(*frame)
    work = tmp_path / f"{grid}"
    shutil.rmtree(work, ignore_errors=True)
    folder = folder_of(tiny, work / "folder", grid)
    spec = open_tower(tiny).spec
    order = make_tables(spec, [grid])["window_index"]
    sides = [side for side in range(1, len(order) + 1) if len(order) % side == 0]
    same = {
        other
        for other in (Grid(1, 2 * side, 2 * len(order) // side) for side in sides)
        for grouped in (False, True)
        if np.array_equal(make_tables(spec, [other], grouped=grouped)["window_index"], order)
    }
    if same != {grid}:  # one window wide or one token high: the tokens stay where they are
        with pytest.raises(ConfigurationError) as refused:
            imported(tiny, folder, work / "bundle")
        assert all(f"{each.h}x{each.w}" in refused.value.message for each in same)
    assert imported(tiny, folder, work / "bundle", grid=grid if same != {grid} else None).grids == (grid,)
    shutil.rmtree(work)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_kernel_may_be_rounded_and_is_packed_as_the_checkpoint_has_it(tmp_path, dtype):
    checkpoint = random_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    folder = folder_of(checkpoint, tmp_path / "folder")
    bundle = imported(checkpoint, folder, tmp_path / "bundle", self_contained=True)
    source = open_tower(checkpoint).weights
    name = "patch_embed.proj.weight"
    assert differing_weights(bundle.tower.weights, {name: source[name]}) == ()
    assert bundle.tower.weights[name].dtype == dtype


def test_a_kernel_that_the_exporter_rounded_to_bfloat16_is_the_checkpoints(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder")
    kernel = load_file(tiny / "model.safetensors")["visual.patch_embed.proj.weight"]
    rounded = kernel.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert not np.array_equal(rounded, kernel)

    def change(graph):
        tensor = constant_of(graph, "patch_embed.proj.weight")
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))

    edit(folder, change)
    bundle = imported(tiny, folder, tmp_path / "bundle", self_contained=True)
    assert bundle.tower.weights["patch_embed.proj.weight"].dtype == "bfloat16"


def test_the_digits_tower_is_imported(digits, tmp_path):
    folder = folder_of(digits, tmp_path / "folder", Grid(1, 12, 22), layout="directory")
    assert imported(digits, folder, tmp_path / "bundle").grids == (Grid(1, 12, 22),)
    assert open_bundle(tmp_path / "bundle").manifest.processor_digest is not None


def stripped(tiny, folder):
    """A tiny checkpoint with a language model, and its copy without the vision weights."""
    whole = shutil.copytree(tiny, folder / "whole")
    tensors = load_file(whole / "model.safetensors")
    save_file({**tensors, "lm_head.weight": np.ones((4, 4), np.float32)}, whole / "model.safetensors")
    return whole, strip_checkpoint(Checkpoint(whole), folder / "stripped").folder


def test_a_stripped_checkpoint_is_enough_for_a_bundle_with_the_hosts_weights(tiny, tmp_path):
    whole, bare = stripped(tiny, tmp_path)
    folder = folder_of(whole, tmp_path / "folder")
    with pytest.raises(ConfigurationError, match="--self-contained"):
        imported(bare, folder, tmp_path / "bundle")
    result = import_artifact(
        tower_of(Checkpoint(bare)), [ImportRequest(folder)], tmp_path / "bundle", self_contained=True
    )
    assert "visionaccel validate" in result.warnings[0]
    ours = imported(whole, folder, tmp_path / "own", self_contained=True)
    assert result.bundle.manifest.weights_digest == ours.manifest.weights_digest
    assert load_file(tmp_path / "bundle" / "model.safetensors").keys() == {"visual.patch_embed.proj.weight"}
    assert (tmp_path / "bundle" / "model.safetensors").read_bytes() == (tmp_path / "own/model.safetensors").read_bytes()


def test_a_stripped_checkpoint_without_its_note_is_refused(tiny, tmp_path):
    whole, bare = stripped(tiny, tmp_path)
    (bare / "visionaccel_stripped.json").unlink()
    with pytest.raises(ConfigurationError, match="nor a note of"):
        imported(bare, folder_of(whole, tmp_path / "folder"), tmp_path / "bundle", self_contained=True)
    assert not (tmp_path / "bundle").exists()


def test_a_note_says_nothing_of_a_checkpoint_that_holds_vision_weights_again(tiny, tmp_path):
    whole, bare = stripped(tiny, tmp_path)
    name = "visual.merger.mlp.0.bias"
    again = {**load_file(bare / "model.safetensors"), name: load_file(whole / "model.safetensors")[name]}
    save_file(again, bare / "model.safetensors")
    with pytest.raises(ConfigurationError, match="contains neither all the vision weights"):
        imported(bare, folder_of(whole, tmp_path / "folder"), tmp_path / "bundle", self_contained=True)


def test_a_bundle_with_the_hosts_weights_alone_offers_no_other_program(tiny, tmp_path):
    bundle = imported(tiny, folder_of(tiny, tmp_path / "folder"), tmp_path / "bundle", self_contained=True)
    assert not bundle.tower.complete
    assert bundle.programs([CHECKPOINT, ONNX]) == ()
    assert [program.format for program in bundle.programs([CHECKPOINT, FLEXMLRT_RAI])] == [FLEXMLRT_RAI]
    whole = imported(tiny, tmp_path / "folder", tmp_path / "whole")
    assert whole.tower.complete
    assert [program.name for program in whole.programs([CHECKPOINT])] == ["checkpoint"]


def test_a_bundle_with_the_hosts_weights_alone_takes_no_onnx_program(tiny, tmp_path):
    from bundles import reseal

    imported(tiny, folder_of(tiny, tmp_path / "folder"), tmp_path / "bundle", self_contained=True)
    write_bundle(tiny, tmp_path / "onnx", "20x12")
    shutil.copy(tmp_path / "onnx" / "20x12.onnx", tmp_path / "bundle")
    (program,) = document(tmp_path / "onnx")["programs"]
    reseal(tmp_path / "bundle", lambda manifest: manifest["programs"].append({**program, "name": "other"}))
    with pytest.raises(BundleError, match="from the bundle, but some are missing"):
        open_bundle(tmp_path / "bundle")


def test_the_command_imports_and_inspect_shows_the_files_names(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder")
    rename(folder, PUBLISHED)
    runner = CliRunner()
    arguments = ["import-vitisai", str(folder), str(tmp_path / "bundle"), "--checkpoint", str(tiny)]
    assert "20x12" in runner.invoke(app, arguments, catch_exceptions=False).stdout
    again = runner.invoke(app, [*arguments, "--force", "--json", "--precision", "float16"], catch_exceptions=False)
    (program,) = json.loads(again.stdout)["manifest"]["programs"]
    assert (program["precision"], program["device"]) == ("float16", "simulator")
    shown = runner.invoke(app, ["inspect", str(tmp_path / "bundle"), "--json"], catch_exceptions=False)
    (row,) = json.loads(shown.stdout)["programs"]
    assert row["stored_names"]["patch_embeddings"] == PUBLISHED[DEVICE_INPUT]
    table = runner.invoke(app, ["inspect", str(tmp_path / "bundle")], catch_exceptions=False, env={"COLUMNS": "200"})
    assert PUBLISHED[DEVICE_INPUT] in table.stdout


def test_paths_of_single_files_are_taken_too(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder")
    shutil.copy(folder / "vision.rai", folder / "other.rai")
    assert imported(tiny, folder / "other.rai", tmp_path / "bundle").manifest.programs[0].model == "20x12/other.rai"
    with pytest.raises(ConfigurationError, match=r"other\.rai, vision\.rai.*--artifact"):
        imported(tiny, folder, tmp_path / "none")
    imported(tiny, folder, tmp_path / "chosen", artifact=Path("vision.rai"))
    shutil.copy(folder / "vision.onnx", folder / "other.onnx")
    with pytest.raises(ConfigurationError, match=r"other\.onnx, vision\.onnx.*--onnx"):
        imported(tiny, folder, tmp_path / "none", artifact=Path("vision.rai"))
    imported(tiny, folder, tmp_path / "named", artifact=Path("vision.rai"), model=Path("vision.onnx"))
