"""Exporters write one host part in many ways; each is known again."""

from dataclasses import replace as replace_fields

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_import_vitisai import LANDSCAPE, constant_of, edit, folder_of, imported, node_of, replace

from towers import random_patches
from visionaccel import open_encoder
from visionaccel.encoder import open_tower
from visionaccel_flexmlrt.vitisai.graph import OnnxGraph
from visionaccel_flexmlrt.vitisai.recognition import UnknownHostError, recognise_host


def _identities(graph):
    for which in (0, -1):
        gather = node_of(graph, "Gather", which)
        inner = helper.make_node("Identity", [gather.input[0]], [f"same{which}"])
        gather.input[0] = f"same{which}"
        replace(graph, gather, inner, onnx.NodeProto.FromString(gather.SerializeToString()))


def _casts(graph):
    conv = node_of(graph, "Conv")
    cast = helper.make_node("Cast", [conv.input[0]], ["cast"], to=TensorProto.FLOAT)
    conv.input[0] = "cast"
    replace(graph, conv, cast, onnx.NodeProto.FromString(conv.SerializeToString()))


def _constant_nodes(graph):
    for name in ("window_index", "reverse_index", "rows_shape", "merged_shape"):
        tensor = constant_of(graph, name)
        node = helper.make_node("Constant", [], [name], value=onnx.TensorProto.FromString(tensor.SerializeToString()))
        graph.initializer.remove(tensor)
        graph.node.insert(0, node)


def _narrow_indices(graph):
    for name in ("window_index", "reverse_index"):
        tensor = constant_of(graph, name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int32), name))


def _negative_axes(graph):
    node_of(graph, "Gather").attribute[0].i = -3
    node_of(graph, "Gather", -1).attribute[0].i = -2


def _squeezes(graph):
    reshape = node_of(graph, "Reshape", 1)
    axes = numpy_helper.from_array(np.array([2, 3, -1]), "axes")
    graph.initializer.append(axes)
    replace(graph, reshape, helper.make_node("Squeeze", [reshape.input[0], "axes"], list(reshape.output)))


def _flattens(graph):
    reshape = node_of(graph, "Reshape", 1)
    replace(graph, reshape, helper.make_node("Flatten", [reshape.input[0]], list(reshape.output)))


def _wraps(graph):
    """A batch of one around the tokens, and an axis of one moved about."""
    gather = node_of(graph, "Gather")
    graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
    wrapped = helper.make_node("Unsqueeze", [gather.input[0], "axis"], ["wrapped"])
    turned = helper.make_node("Transpose", ["wrapped"], ["turned"], perm=[1, 0, 2, 3])
    back = helper.make_node("Transpose", ["turned"], ["back"], perm=[1, 0, 2, 3])
    gathered = helper.make_node("Gather", ["back", "window_index"], ["gathered"], axis=1)
    again = helper.make_node("Squeeze", ["gathered", "axis"], list(gather.output))
    replace(graph, gather, wrapped, turned, back, gathered, again)


def _product(kind):
    def change(graph):
        conv, kernel = node_of(graph, "Conv"), "patch_embed.proj.weight"
        flat = numpy_helper.from_array(np.array([0, -1]), "flat")
        graph.initializer.append(flat)
        nodes = [helper.make_node("Reshape", [kernel, "flat"], ["matrix"])]
        rows = helper.make_node("Reshape", [conv.input[0], "flat"], ["rows"])
        if kind == "Gemm":
            nodes += [rows, helper.make_node("Gemm", ["rows", "matrix"], list(conv.output), transB=1)]
        else:
            nodes += [rows, helper.make_node("Transpose", ["matrix"], ["columns"], perm=[1, 0])]
            nodes += [helper.make_node("MatMul", ["rows", "columns"], list(conv.output))]
        replace(graph, conv, *nodes)

    return change


def _zero_bias(graph):
    conv = node_of(graph, "Conv")
    graph.initializer.append(numpy_helper.from_array(np.zeros(32, np.float32), "bias"))
    conv.input.append("bias")


EXPORTERS = {
    "identities": _identities,
    "casts": _casts,
    "constant nodes": _constant_nodes,
    "int32 indices": _narrow_indices,
    "negative axes": _negative_axes,
    "squeeze": _squeezes,
    "flatten": _flattens,
    "a batch of one": _wraps,
    "gemm": _product("Gemm"),
    "matmul": _product("MatMul"),
    "a bias of zero": _zero_bias,
}


@pytest.mark.parametrize("change", EXPORTERS.values(), ids=EXPORTERS)
def test_what_exporters_write_in_other_ways_is_the_same_host_part(tiny, tmp_path, change):
    folder = folder_of(tiny, tmp_path / "folder", LANDSCAPE)
    edit(folder, change)
    patches = random_patches([(1, 12, 20)])
    session = onnxruntime.InferenceSession(folder / "vision.onnx")
    with open_encoder(tiny, backend="onnxrt") as encoder:
        np.testing.assert_allclose(
            session.run(None, {"pixel_values": patches})[0], encoder.encode(patches, [LANDSCAPE]), rtol=0, atol=2e-5
        )
    assert imported(tiny, folder, tmp_path / "bundle").grids == (LANDSCAPE,)


def _bias(graph):
    conv = node_of(graph, "Conv")
    graph.initializer.append(numpy_helper.from_array(np.arange(32, dtype=np.float32), "bias"))
    conv.input.append("bias")


def _bias_of_each_row(graph):
    constant_of(graph, "bias").CopyFrom(numpy_helper.from_array(np.ones((32, 1), np.float32), "bias"))


def test_the_bias_of_a_tower_that_embeds_with_one_is_the_hosts(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "folder")
    spec = open_tower(tiny).spec
    (embedding,) = spec.embed
    biased = replace_fields(spec, embed=(replace_fields(embedding, bias=True),))

    def found(spec):
        return recognise_host(spec, OnnxGraph.load(folder / "vision.onnx"), None)

    np.testing.assert_array_equal(found(biased).weights["patch_embed.proj.bias"], np.zeros(32))
    edit(folder, _bias)
    np.testing.assert_array_equal(found(biased).weights["patch_embed.proj.bias"], np.arange(32))
    with pytest.raises(UnknownHostError, match="adds a bias, and the tower has none"):
        found(spec)
    edit(folder, _bias_of_each_row)
    with pytest.raises(UnknownHostError, match=r"adds a bias of \[32, 1\] to rows of 32"):
        found(biased)
