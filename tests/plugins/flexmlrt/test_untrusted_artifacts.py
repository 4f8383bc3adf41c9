"""Untrusted artifacts: what is not a file, is larger than it may be, or says one thing of two tensors, is refused."""

import os
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from visionaccel.bundle import point_at_weights
from visionaccel.core.bounded_files import MOST_JSON_BYTES
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError
from visionaccel_flexmlrt.vitisai.graph import OnnxGraph
from visionaccel_flexmlrt.vitisai.layout import PartitionInfo, read_metadata
from visionaccel_flexmlrt.vitisai.recognition import UnknownHostError, moved

READERS = {
    "partition-info.json": lambda path: read_metadata(path, PartitionInfo),
    "vision.onnx": lambda path: OnnxGraph.load(path),
}


@pytest.mark.parametrize("name", READERS)
def test_a_named_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(BundleError, match="not a file"):
        READERS[name](tmp_path / name)


def test_a_document_that_is_too_large_is_not_parsed(tmp_path):
    file = tmp_path / "partition-info.json"
    file.write_bytes(b"{" + b" " * MOST_JSON_BYTES + b"}")
    with pytest.raises(BundleError, match=f"larger than {MOST_JSON_BYTES}"):
        READERS[file.name](file)


def external(name, offset, length=16, location="w.data"):
    """A weight of four floats in a file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL, dims=[4])
    places = {"location": location, "offset": offset, **({} if length is None else {"length": length})}
    for key, value in places.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph_of(*weights, nodes=()):
    return helper.make_model(helper.make_graph(list(nodes), "g", [], [], list(weights)))


@pytest.mark.parametrize(
    "weights",
    [
        [external("a", 0), external("b", 8)],
        [external("a", 0), external("b", 0)],
        [external("b", 8, None), external("a", 0, location="./w.data")],
    ],
)
def test_tensors_of_an_artifact_that_share_bytes_of_a_file_are_refused(tmp_path, weights):
    with pytest.raises(BundleError, match=r"tensors '.' and '.' overlap in 'w\.data'"):
        OnnxGraph(graph_of(*weights), tmp_path / "vision.onnx")
    OnnxGraph(graph_of(external("a", 0), external("b", 16), external("c", 0, location="v")), tmp_path / "vision.onnx")


def test_overlaps_are_found_in_constants_and_graphs_within(tmp_path):
    body = helper.make_graph([], "body", [], [], [external("inner", 8)])
    nodes = [
        helper.make_node("If", ["c"], ["x"], then_branch=body, else_branch=body),
        helper.make_node("Constant", [], ["y"], value=external("constant", 40)),
    ]
    for weight in (external("w", 16), external("w", 48)):
        with pytest.raises(BundleError, match="overlap"):
            OnnxGraph(graph_of(weight, nodes=nodes), tmp_path / "vision.onnx")


ADD = helper.make_node("Add", ["x", "x"], ["w"])


@pytest.mark.parametrize(
    ("weights", "nodes"),
    [
        ([numpy_helper.from_array(np.zeros(n, np.float32), "w") for n in (1, 2)], []),
        ([numpy_helper.from_array(np.zeros(1, np.float32), "w")], [ADD]),
        ([], [ADD, helper.make_node("Mul", ["x", "x"], ["w"])]),
        ([], [helper.make_node("Split", ["x"], ["w", "w"])]),
    ],
)
def test_a_tensor_that_is_named_twice_is_refused_in_artifacts_and_in_programs(tiny, tmp_path, weights, nodes):
    model = graph_of(*weights, nodes=nodes)
    with pytest.raises(BundleError, match="'w'"):
        OnnxGraph(model, tmp_path / "vision.onnx")
    with pytest.raises(BundleError, match="'w'"):
        point_at_weights(model.SerializeToString(), open_tower(tiny).weights, tiny)


def test_very_many_dimensions_are_refused_before_they_are_multiplied(tmp_path):
    started, many = time.process_time(), [2**62] * 300_000
    inline = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=many, raw_data=b"1234")
    with pytest.raises(BundleError, match="too many dimensions: 300000"):
        OnnxGraph(graph_of(), tmp_path / "vision.onnx").values(inline)
    assert time.process_time() - started < 20


def test_a_constant_that_is_made_of_one_twice_and_so_on_ends(tmp_path):
    """Sixty-four operators, each of which reads the one before twice, would otherwise be computed 2**64 times."""
    first = numpy_helper.from_array(np.array([1], np.int64), "d0")
    nodes = [helper.make_node("Reshape", [f"d{n}", f"d{n}"], [f"d{n + 1}"]) for n in range(64)]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], [first]))
    graph = OnnxGraph(model, tmp_path / "vision.onnx")
    assert graph.constant("d3").tolist() == [1]
    assert graph.constant("d40") is None


def constant_of(name, **fields):
    attribute = onnx.AttributeProto(name=name, **fields)
    return graph_of(nodes=[onnx.NodeProto(op_type="Constant", name="c", output=["w"], attribute=[attribute])])


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("value_int", {"i": 3}, 3),
        ("value_ints", {"ints": [2, -1]}, [2, -1]),
        ("value_float", {"f": 0.5}, 0.5),
        ("value_floats", {"floats": [0.5, 2.0]}, [0.5, 2.0]),
        ("value", {"t": numpy_helper.from_array(np.arange(3))}, [0, 1, 2]),
    ],
)
def test_a_constant_whose_attribute_states_no_type_is_read_by_its_name(tmp_path, name, fields, expected):
    found = OnnxGraph(constant_of(name, **fields), tmp_path / "vision.onnx").constant("w")
    assert found.tolist() == expected


@pytest.mark.parametrize("name", ["value_int", "value_ints", "value_float", "value_floats", "value"])
@pytest.mark.parametrize(
    "fields",
    [
        {"ref_attr_name": "of_a_function"},
        {"type": onnx.AttributeProto.STRING, "s": b"three"},
        {"type": onnx.AttributeProto.GRAPHS},
    ],
)
def test_a_constant_whose_attribute_is_of_another_type_is_refused(tmp_path, name, fields):
    with pytest.raises(BundleError, match="Constant 'c' is malformed"):
        OnnxGraph(constant_of(name, **fields), tmp_path / "vision.onnx").constant("w")


def test_optional_inputs_that_are_left_empty_at_the_end_are_not_there(tmp_path):
    cast = helper.make_node("Cast", ["x", ""], ["w"], to=TensorProto.INT64)
    weight = numpy_helper.from_array(np.array([1, 2], np.int32), "x")
    graph = OnnxGraph(graph_of(weight, nodes=[cast]), tmp_path / "vision.onnx")
    assert graph.constant("w").tolist() == [1, 2]
    squeeze = helper.make_node("Squeeze", ["y", ""], ["z"])
    assert moved(graph, squeeze, (1, 4, 1, 6)) == (4, 6)
    with pytest.raises(UnknownHostError, match="not constant"):
        moved(graph, helper.make_node("Reshape", ["y", "x2"], ["z"]), (4, 6))


def test_external_data_is_no_larger_than_a_host_part_can_be(tmp_path):
    """The file may be a hole, which takes no disk and all of the memory."""
    with (tmp_path / "data").open("wb") as hole:
        hole.truncate(2**40)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL, dims=[2**20, 2**8])
    tensor.external_data.add(key="location", value="data")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    with pytest.raises(BundleError, match="impossible shape"):
        OnnxGraph(onnx.load_model_from_string(model.SerializeToString()), tmp_path / "vision.onnx").constant("w")


def test_a_model_of_very_many_operators_is_refused_before_they_are_looked_at(tmp_path):
    nodes = [helper.make_node("Identity", ["x"], [f"y{number}"]) for number in range(200_001)]
    file = tmp_path / "vision.onnx"
    file.write_bytes(helper.make_model(helper.make_graph(nodes, "g", [], [])).SerializeToString())
    with pytest.raises(BundleError, match="more than 200000 operators"):
        OnnxGraph.load(file)
