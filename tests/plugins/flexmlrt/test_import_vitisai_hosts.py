"""Host parts that ONNX Runtime runs: extracted from a model that no family recognises, or within a compiled one."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_import_vitisai import LANDSCAPE, PORTRAIT, constant_of, edit, folder_of, imported, run_partition
from test_import_vitisai_refusals import _add, _norm, change_json, refused

from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.core.program import CHECKPOINT, EP_CONTEXT, PIXELS
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError, ConfigurationError
from visionaccel_flexmlrt.artifact import FLEXMLRT_DIRECTORY, FLEXMLRT_RAI
from visionaccel_flexmlrt.simulator import compile_partition
from visionaccel_flexmlrt.vitisai import ImportRequest, import_vitisai
from visionaccel_flexmlrt.vitisai.writing import DEVICE_INPUT, DEVICE_OUTPUT, EMBEDDINGS, write_vitisai_folder
from visionaccel_onnxrt.ep_context import verified_context
from visionaccel_testing.checkpoints import TINY_TOWERS, random_checkpoint


def strange(tiny, folder, layout="directory", **settings):
    """A folder whose host adds a position before the device and normalises after it."""
    folder_of(tiny, folder, layout=layout, **settings)
    edit(folder, _add)
    edit(folder, _norm)
    return folder


@pytest.mark.parametrize("layout", ["directory", "rai"])
def test_the_extracted_host_around_the_partition_computes_the_whole_model(tiny, tmp_path, layout):
    folder = strange(tiny, tmp_path / "folder", layout, metadata=True)
    bundle = imported(tiny, folder, tmp_path / "bundle", host_on_onnxrt=True, grid=PORTRAIT)
    (program,) = bundle.programs([FLEXMLRT_RAI, FLEXMLRT_DIRECTORY])
    assert program.host is None
    assert [str(spec) for spec in (*program.inputs, *program.outputs)] == [
        "pixel_values: float32[240, 96]", "embeddings: float32[60, 24]",
    ]  # fmt: skip
    assert program.stored_names == {"embeddings": EMBEDDINGS}
    assert json.loads(program.companions["device_tensors"].read_text()) == {
        "inputs": [{"name": DEVICE_INPUT, "dtype": "float32", "shape": [60, 4, 32]}],
        "outputs": [{"name": DEVICE_OUTPUT, "dtype": "float32", "shape": [60, 24]}],
    }
    before, after = (
        onnxruntime.InferenceSession(program.companions[role].read_bytes()) for role in ("host_before", "host_after")
    )
    patches = random_patches([(1, 20, 12)])
    taken = before.run([DEVICE_INPUT], {"pixel_values": patches})[0]
    given = run_partition(folder, {DEVICE_INPUT: taken})
    ours = after.run([EMBEDDINGS], given)[0]
    exact = onnxruntime.InferenceSession(folder / "vision.onnx").run(None, {"pixel_values": patches})[0]
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)


def test_what_cannot_be_checked_is_said(tiny, tmp_path):
    folder = strange(tiny, tmp_path / "folder")
    with pytest.raises(ConfigurationError, match=r"which grid it was compiled for.*--grid.*visionaccel validate"):
        imported(tiny, folder, tmp_path / "bundle", host_on_onnxrt=True)
    request = ImportRequest(folder, host_on_onnxrt=True, grid=PORTRAIT)
    warnings = import_vitisai(open_tower(tiny), [request], tmp_path / "bundle").warnings
    assert "were not compared with the checkpoint" in warnings[0]
    assert "20x12 could not be checked" in warnings[1]


def test_a_recognised_host_stays_the_packages_own(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder")
    (program,) = imported(tiny, folder, tmp_path / "bundle", host_on_onnxrt=True).manifest.programs
    assert program.host is not None
    assert not program.companions


def test_another_number_of_patches_than_the_grids_is_refused(tiny, tmp_path):
    folder = strange(tiny, tmp_path / "folder")
    grid = type(PORTRAIT)(1, 20, 14)
    refused(
        tiny, folder, r"pixel_values: float32\[240, 96\], but a program for grid 20x14", host_on_onnxrt=True, grid=grid
    )


def test_without_the_devices_tensors_nothing_is_extracted(tiny, tmp_path):
    folder = strange(tiny, tmp_path / "folder", "rai")
    refused(tiny, folder, r"Add 'position'.*flexmlrt-hsi\.json", host_on_onnxrt=True, grid=PORTRAIT)


def test_a_host_that_reaches_around_the_device_is_refused(tiny, tmp_path):
    folder = strange(tiny, tmp_path / "folder")

    def around(graph):
        zero = numpy_helper.from_array(np.zeros((240, 24), np.float32), "nothing")
        graph.initializer.append(zero)
        graph.node[-1].output[0] = "inner"
        nodes = [
            helper.make_node("ReduceMean", ["pixel_values"], ["mean"], keepdims=0, name="mean"),
            helper.make_node("Add", ["inner", "mean"], [EMBEDDINGS], name="sum"),
        ]
        graph.node.extend(nodes)

    edit(folder, around)
    refused(tiny, folder, "read tensors from before it", host_on_onnxrt=True, grid=PORTRAIT)


def test_several_tensors_at_the_devices_edge_are_not_recognised(tiny, tmp_path):
    folder = strange(tiny, tmp_path / "folder")
    second = {"tensor_name": "moved", "cpu_shape": [60, 4, 32], "cpu_dtype": "fp32"}
    (folder / "vision_cache" / "connectivity_metadata.json").unlink()
    change_json(
        folder / "vision_cache" / "vaiml_par_0" / "0" / "flexmlrt-hsi.json", lambda v: v["inputs"].append(second)
    )
    refused(tiny, folder, "the device takes or returns several tensors.*Add 'position'")
    bundle = imported(tiny, folder, tmp_path / "bundle", host_on_onnxrt=True, grid=PORTRAIT)
    (program,) = bundle.programs([FLEXMLRT_DIRECTORY])
    session = onnxruntime.InferenceSession(program.companions["host_before"].read_bytes())
    assert [value.name for value in session.get_outputs()] == [DEVICE_INPUT, "moved"]


def test_a_device_that_does_everything_leaves_the_host_no_graph(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder", layout="directory")
    (folder / "vision_cache" / "connectivity_metadata.json").unlink()

    def whole(table):
        table["inputs"][0] |= {"tensor_name": PIXELS, "cpu_shape": [240, 96]}
        table["outputs"][0] |= {"tensor_name": EMBEDDINGS, "cpu_shape": [60, 24]}

    change_json(folder / "vision_cache" / "vaiml_par_0" / "0" / "flexmlrt-hsi.json", whole)
    bundle = imported(tiny, folder, tmp_path / "bundle", host_on_onnxrt=True, grid=PORTRAIT)
    assert set(bundle.manifest.programs[0].companions) == {"device_tensors"}


def compiled(tiny, folder, *, embedded=False, source="VitisAIExecutionProvider", context="vision.bin", change=None):
    """A folder as ONNX Runtime's VitisAI provider leaves it: the device's part is one node of the model."""
    folder_of(tiny, folder)
    (folder / "vision.rai").unlink()

    def replace_partition(graph):
        nodes = list(graph.node)
        start = next(i for i, node in enumerate(nodes) if DEVICE_INPUT in node.output) + 1
        end = next(i for i, node in enumerate(nodes) if DEVICE_OUTPUT in node.input)
        attributes = {
            "embed_mode": int(embedded), "ep_cache_context": context, "source": source, "main_context": 1,
        }  # fmt: skip
        node = helper.make_node(
            "EPContext", [DEVICE_INPUT], [DEVICE_OUTPUT], "device", domain="com.microsoft", **attributes
        )
        del graph.node[start:]
        graph.node.extend([node, *nodes[end:]])
        used = {name for each in graph.node for name in each.input}
        for tensor in list(graph.initializer):
            if tensor.name not in used:
                graph.initializer.remove(tensor)
        if change:
            change(graph)

    edit(folder, replace_partition)
    (folder / "vision.bin").write_bytes(b"compiled")
    return folder


def test_a_compiled_model_is_taken_with_the_file_that_it_names(tiny, tmp_path):
    folder = compiled(tiny, tmp_path / "folder")
    bundle = imported(tiny, folder, tmp_path / "bundle")
    (program,) = bundle.programs([EP_CONTEXT])
    assert bundle.grids == (PORTRAIT,)
    assert program.host is None
    assert program.device == "npu"
    assert program.stored_names == {"embeddings": EMBEDDINGS}
    assert {file.path for file in bundle.manifest.programs[0].files} == {
        "20x12/vision.onnx", "20x12/vision.onnx.data", "20x12/vision.bin",
    }  # fmt: skip
    assert program.artifact.read_bytes() == (folder / "vision.onnx").read_bytes()
    assert verified_context(program, "VitisAIExecutionProvider") == program.artifact, "a backend accepts its files"
    assert program.artifact.with_name("vision.bin").read_bytes() == b"compiled"
    refused(tiny, folder, "not for grid 12x20", ConfigurationError, grid=LANDSCAPE)


def test_a_compiled_model_may_hold_its_program(tiny, tmp_path):
    folder = compiled(tiny, tmp_path / "folder", embedded=True, context="../bytes of a program")
    (entry,) = imported(tiny, folder, tmp_path / "bundle", self_contained=True).manifest.programs
    assert {file.path for file in entry.files} == {"20x12/vision.onnx", "20x12/vision.onnx.data"}


@pytest.mark.parametrize("context", ["../vision.bin", "/etc/hostname", "a/vision.bin", "", "..", "c:vision.bin"])
def test_a_path_out_of_the_folder_is_refused(tiny, tmp_path, context):
    (tmp_path / "vision.bin").write_bytes(b"secret")
    refused(tiny, compiled(tiny, tmp_path / "folder", context=context), "not a plain file name")


def test_an_absent_context_and_another_providers_are_refused(tiny, tmp_path):
    refused(tiny, compiled(tiny, tmp_path / "absent", context="other.bin"), "other.bin, which does not exist")
    other = compiled(tiny, tmp_path / "other", source="QNNExecutionProvider")
    refused(tiny, other, "by provider 'QNNExecutionProvider', not VitisAIExecutionProvider")


def test_a_compiled_model_with_an_unknown_host_needs_the_grid(tiny, tmp_path):
    folder = compiled(tiny, tmp_path / "folder", change=lambda graph: (_add(graph), _norm(graph)))
    refused(tiny, folder, "cannot tell which grid", ConfigurationError)
    bundle = imported(tiny, folder, tmp_path / "bundle", grid=LANDSCAPE)
    assert bundle.grids == (LANDSCAPE,)


def test_the_kernel_of_a_compiled_model_is_compared_too(tiny, tmp_path):
    def zero(graph):
        tensor = constant_of(graph, "patch_embed.proj.weight")
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))

    refused(tiny, compiled(tiny, tmp_path / "folder", change=zero), "compiled from different weights")


def test_a_rai_beside_its_compiled_model_gets_its_tensors_from_the_node(tiny, tmp_path):
    folder = compiled(tiny, tmp_path / "folder", context="vision.rai")
    (folder / "vision.rai").write_bytes(bytes(2_000_000))
    (program,) = imported(tiny, folder, tmp_path / "bundle").programs([FLEXMLRT_RAI])
    assert program.stored_names == {
        "patch_embeddings": DEVICE_INPUT, "window_embeddings": DEVICE_OUTPUT,
    }  # fmt: skip
    assert program.host is not None

    def twice(graph):
        node = next(node for node in graph.node if node.op_type == "EPContext")
        graph.node.add().CopyFrom(node)
        graph.node[-1].output[0], graph.node[-1].name = "second", "device_1"

    edit(folder, twice)
    refused(tiny, folder, r"several partitions \('device', 'device_1'\)")


def test_weights_of_a_compiled_model_are_copies_since_runtimes_refuse_hard_links(tiny, tmp_path):
    folder = compiled(tiny, tmp_path / "folder")
    imported(tiny, folder, tmp_path / "bundle")
    assert (tmp_path / "bundle/20x12/vision.onnx.data").stat().st_nlink == 1
    model = onnx.load(tmp_path / "bundle/20x12/vision.onnx")
    assert constant_of(model.graph, "patch_embed.proj.weight").data_location == TensorProto.DEFAULT


def test_imported_bundles_refuse_what_was_changed_later(tiny, tmp_path):
    from visionaccel.bundle import open_bundle

    folder = strange(tiny, tmp_path / "folder")
    bundle = imported(tiny, folder, tmp_path / "bundle", host_on_onnxrt=True, grid=PORTRAIT)
    assert [program.format for program in bundle.programs([CHECKPOINT])] == [CHECKPOINT]
    shutil.copy(tmp_path / "bundle/20x12/host_after.onnx", tmp_path / "bundle/20x12/host_before.onnx")
    with pytest.raises(BundleError, match=r"host_before\.onnx"):
        open_bundle(tmp_path / "bundle", checkpoint=open_tower(tiny).checkpoint)


def test_a_tower_without_windows_is_imported_with_its_host_on_onnx_runtime(tmp_path):
    """A tower with learned positions and deepstack levels, from patches to embeddings."""
    checkpoint = random_checkpoint(tmp_path / "checkpoint", family="qwen3_vl")
    folder = tmp_path / "folder"
    write_vitisai_folder(open_tower(checkpoint), folder, PORTRAIT, layout="directory", compile=compile_partition)
    refused(checkpoint, folder, r"towers without windows.*--host-on-onnxrt")
    bundle = imported(checkpoint, folder, tmp_path / "bundle", host_on_onnxrt=True, grid=PORTRAIT)
    patches = random_patches([PORTRAIT.thw], TINY_TOWERS["qwen3_vl"])
    with open_encoder(bundle, backend="flexmlrt", device="simulator") as encoder:
        ours = encoder.encode(patches, [PORTRAIT])
    np.testing.assert_allclose(ours, reference(checkpoint, patches, [PORTRAIT.thw]), rtol=0, atol=2e-5)
