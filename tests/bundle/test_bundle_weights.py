"""Weights are found by name, and nowhere that a program or a link points to."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from bundle_tools import FIXED, encode, forge
from bundles import edit_model
from visionaccel.bundle import export_bundle, open_bundle, point_at_weights
from visionaccel.checkpoint import Checkpoint
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError
from visionaccel_testing.checkpoints import random_checkpoint


def test_weights_are_found_by_name_in_a_checkpoint_that_was_sharded_anew(tmp_path):
    checkpoint = random_checkpoint(tmp_path / "checkpoint")
    folder = export_bundle(open_tower(checkpoint), tmp_path / "bundle", [FIXED]).folder
    exact = encode(folder)
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(weights, reverse=True)
    parts = {f"part-{number}.safetensors": names[number::3] for number in range(3)}
    for file, part in parts.items():
        save_file({"padding": np.zeros(len(file) + 7), **{name: weights[name] for name in part}}, checkpoint / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(encode(folder), exact)


def test_another_checkpoint_in_the_place_of_the_exported_one_is_refused(tmp_path):
    checkpoint = random_checkpoint(tmp_path / "checkpoint")
    folder = export_bundle(open_tower(checkpoint), tmp_path / "bundle", [FIXED]).folder
    shutil.rmtree(checkpoint)
    random_checkpoint(checkpoint, seed=1)
    with pytest.raises(BundleError, match="different digest"):
        open_bundle(folder)


def test_the_checkpoint_that_is_given_serves_where_the_named_one_is_gone(tmp_path):
    checkpoint = random_checkpoint(tmp_path / "checkpoint")
    folder = export_bundle(open_tower(checkpoint), tmp_path / "bundle", [FIXED]).folder
    exact = encode(folder)
    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match="is not a folder"):
        open_bundle(folder)
    with pytest.raises(BundleError, match="different digest"):
        open_bundle(folder, checkpoint=Checkpoint(random_checkpoint(tmp_path / "other", seed=1)))
    np.testing.assert_array_equal(encode(open_bundle(folder, checkpoint=Checkpoint(tmp_path / "moved"))), exact)


def test_a_source_that_can_be_no_path_leaves_the_given_checkpoint(tiny, referring, tmp_path):
    folder = shutil.copytree(referring, tmp_path / "bundle")
    forge(folder, lambda stated: stated["checkpoint"].update(source="x" * 4000))
    with pytest.raises(BundleError, match="too long"):
        open_bundle(folder)
    assert open_bundle(folder, checkpoint=Checkpoint(tiny)).tower.checkpoint.folder == tiny


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    checkpoint = random_checkpoint(tmp_path / "checkpoint")
    folder = export_bundle(open_tower(checkpoint), tmp_path / "bundle", [FIXED]).folder
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["fullatt_block_indexes"] = [2]
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match="different vision configuration"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("location", "offset"),
    [("../../etc/passwd", "0"), ("/etc/passwd", "0"), ("model.safetensors", "8"), ("*/_ORT_MEM_ADDR_/*", "4096")],
)
def test_the_places_that_a_program_names_are_never_followed(bundle, contained, location, offset):
    def point_elsewhere(model):
        for initializer in model.graph.initializer:
            for entry in initializer.external_data:
                entry.value = {"location": location, "offset": offset}.get(entry.key, entry.value)

    edit_model(bundle, "10x18", point_elsewhere)
    np.testing.assert_array_equal(encode(bundle), encode(contained))


def outside():
    """A tensor that lies in another file."""
    tensor = onnx.TensorProto(name="secret", data_type=onnx.TensorProto.UINT8, dims=[8])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def in_a_node(model):
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["secret"], value=outside()))


def in_a_subgraph(model):
    graph = onnx.helper.make_graph([], "g", [], [], [outside()])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["secret"], then_branch=graph, else_branch=graph))


def in_a_nodes_list_of_graphs(model):
    node = onnx.helper.make_node("Constant", [], ["secret"], value=outside())
    graph = onnx.helper.make_graph([node], "g", [], [])
    model.graph.node.append(onnx.helper.make_node("Other", [], ["secret"], domain="other", graphs=[graph]))


def in_a_function(model):
    node = onnx.helper.make_node("Constant", [], ["secret"], value=outside())
    opsets = [onnx.helper.make_opsetid("", 17)]
    model.functions.append(onnx.helper.make_function("other", "f", [], ["secret"], [node], opsets))


def in_a_functions_default(model):
    in_a_function(model)
    del model.functions[0].node[:]
    model.functions[0].attribute_proto.append(onnx.helper.make_attribute("value", outside()))


def in_sparse_values(model):
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=outside(), dims=[8]))


def in_a_training_step(model):
    model.training_info.add().initialization.initializer.append(outside())


@pytest.mark.parametrize(
    "hide",
    [
        in_a_node, in_a_subgraph, in_a_nodes_list_of_graphs, in_a_function, in_a_functions_default, in_sparse_values,
        in_a_training_step,
    ],
    ids=lambda hide: hide.__name__,
)  # fmt: skip
def test_external_data_that_is_no_weight_of_the_graph_is_refused(bundle, hide):
    edit_model(bundle, "10x18", hide)
    program = open_bundle(bundle).programs(["onnx"])[0]
    with pytest.raises(BundleError, match="external data that is not a weight"):
        program.model()
    with pytest.raises(BundleError, match="external data that is not a weight"):
        encode(bundle)


def test_a_program_that_wraps_a_compiled_one_elsewhere_is_refused(bundle):
    def wrap(model):
        model.graph.node.add(op_type="EPContext", domain="com.microsoft")

    edit_model(bundle, "10x18", wrap)
    with pytest.raises(BundleError, match="EPContext"):
        encode(bundle)


def test_the_given_checkpoint_comes_before_the_named_one(tiny, referring, monkeypatch):
    asked = []
    monkeypatch.setattr("visionaccel.bundle.bundle.locate_checkpoint", lambda *named: asked.append(named))
    assert open_bundle(referring, checkpoint=Checkpoint(tiny)).tower.checkpoint.folder == tiny
    assert asked == []


def test_a_program_that_needs_another_weight_than_is_there_is_refused(bundle):
    def rename(model):
        next(each for each in model.graph.initializer if each.external_data).name = "blocks.9.norm1.weight"

    edit_model(bundle, "10x18", rename)
    with pytest.raises(BundleError, match=r"'blocks\.9\.norm1\.weight', which is missing"):
        encode(bundle)


@pytest.mark.parametrize(
    ("field", "value"), [("data_type", onnx.TensorProto.FLOAT16), ("dims", [7]), ("dims", [2**62, 4, 0])]
)
def test_a_weight_of_another_kind_than_the_stored_one_is_refused(tiny, field, value):
    tower = open_tower(tiny)
    model = onnx.load_model_from_string(tower.onnx_model())
    weight = next(each for each in model.graph.initializer if each.external_data)
    if field == "dims":
        del weight.dims[:]
        weight.dims.extend(value)
    else:
        weight.data_type = value
    with pytest.raises(BundleError, match="a different dtype or size"):
        point_at_weights(model.SerializeToString(), tower.weights, tiny)


def test_a_program_that_is_no_onnx_is_refused(bundle):
    (bundle / "10x18.onnx").write_bytes(b"\xff" * 100)
    forge(bundle)
    with pytest.raises(BundleError, match="not an ONNX model"):
        open_bundle(bundle).programs(["onnx"])[0].model()


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", ["weights.pkl", "pytorch_model.bin", "model.pt"])
def test_nothing_is_ever_unpickled(bundle, tmp_path, name, listed):
    marker = tmp_path / "exploded"
    (bundle / name).write_bytes(pickle.dumps(Bomb(marker)))
    if listed:
        forge(bundle, lambda stated: stated["files"].append({"path": name}))
    for backend in ("onnxrt", "torch_ref"):
        assert len(encode(bundle, backend=backend)) == 45
    assert not marker.exists()
    pickle.loads((bundle / name).read_bytes())
    assert marker.exists(), "it would have exploded"


def test_a_pickle_as_a_program_of_another_format_is_only_bytes(bundle, tmp_path):
    data = pickle.dumps(Bomb(tmp_path / "exploded"))
    (bundle / "weights.pkl").write_bytes(data)
    stated = {"format": "pickle", "model": "weights.pkl", "files": [{"path": "weights.pkl"}]}
    forge(bundle, lambda document: document["programs"][0].update(stated))
    (program,) = open_bundle(bundle).programs(["pickle"])
    assert program.model() == data
    assert not (tmp_path / "exploded").exists()
