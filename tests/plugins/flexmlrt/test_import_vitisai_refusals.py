"""What is not the checkpoint's tower, of one grid, whole and undamaged, becomes no bundle."""

import json
import shutil

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from test_import_vitisai import PORTRAIT, constant_of, edit, folder_of, imported, node_of, replace

from visionaccel.core.grid import Grid
from visionaccel.errors import BundleError, ConfigurationError, VisionAccelError
from visionaccel_testing.checkpoints import TINY, random_checkpoint


@pytest.fixture
def folder(tiny, tmp_path):
    return folder_of(tiny, tmp_path / "folder")


@pytest.fixture
def cache(tiny, tmp_path):
    return folder_of(tiny, tmp_path / "cache", layout="directory")


def refused(tiny, folder, match, error=BundleError, **request):
    """Assert that an import is refused, says what to do, and leaves nothing."""
    output = folder.parent / "refused"
    with pytest.raises(error, match=match) as caught:
        imported(tiny, folder, output, **request)
    assert caught.value.hint
    assert not [path for path in folder.parent.iterdir() if "refused" in path.name]


def change_constant(name, change):
    def run(graph):
        tensor = constant_of(graph, name)
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))

    return run


def reorder(change):
    """Another window order, rightly undone at the end."""

    def run(graph):
        order = change(numpy_helper.to_array(constant_of(graph, "window_index")).copy())
        change_constant("window_index", lambda _: order)(graph)
        change_constant("reverse_index", lambda _: np.argsort(order))(graph)

    return run


def test_a_rolled_window_order_is_no_grids_and_the_nearest_is_named(tiny, folder):
    edit(folder, reorder(lambda order: np.roll(order, 1)))
    refused(tiny, folder, r"no grid of 60 tokens has .* order; the nearest is \d+x\d+, which differs in \d+ places")


def test_two_exchanged_tokens_are_noticed(tiny, folder):
    def exchange(order):
        order[[3, 40]] = order[[40, 3]]
        return order

    edit(folder, reorder(exchange))
    refused(tiny, folder, "the nearest is 20x12, which differs in 2 places")


def test_a_reverse_order_that_does_not_undo_the_window_order_is_refused(tiny, folder):
    edit(folder, change_constant("reverse_index", lambda order: np.roll(order, 1)))
    refused(tiny, folder, "60 of 60 entries of the reverse order are not the inverse")


def test_a_window_order_that_loses_a_token_is_refused(tiny, folder):
    edit(folder, change_constant("window_index", lambda order: np.where(order == 5, 6, order)))
    refused(tiny, folder, "not a permutation")


def test_the_kernel_of_another_checkpoint_is_refused(tiny, folder, tmp_path):
    other = random_checkpoint(tmp_path / "other", seed=1)
    refused(other, folder, "is not the one in .*they differ by up to .*compiled from different weights")


def test_a_kernel_that_was_trained_further_is_refused(tiny, folder):
    def train(graph):
        data = (folder / "vision.onnx.data").read_bytes()
        tensor = constant_of(graph, "patch_embed.proj.weight")
        place = {item.key: item.value for item in tensor.external_data}
        kernel = np.frombuffer(data, np.float32, int(place["length"]) // 4, int(place["offset"]))
        tensor.CopyFrom(numpy_helper.from_array((kernel * np.float32(1.0001)).reshape(tensor.dims), tensor.name))

    edit(folder, train)
    refused(tiny, folder, "they differ by up to")


def test_another_size_of_tower_is_refused(folder, tmp_path):
    for field, size in (("hidden_size", 64), ("out_hidden_size", 32), ("patch_size", 8)):
        windows = {"window_size": 64} if field == "patch_size" else {}
        other = random_checkpoint(tmp_path / field, {**TINY, field: size, **windows})
        refused(other, folder, r"the checkpoint's width is|kernel of")


def test_several_grids_with_one_window_order_must_be_chosen_from(tiny, tmp_path):
    folder = folder_of(tiny, tmp_path / "small", Grid(1, 4, 8))
    refused(tiny, folder, "2x16, 4x8, 8x4, 16x2 have the same window order", ConfigurationError)
    refused(tiny, folder, "not for grid 4x16", ConfigurationError, grid=Grid(1, 4, 16))
    assert imported(tiny, folder, tmp_path / "bundle", grid=Grid(1, 8, 4)).grids == (Grid(1, 8, 4),)


def _add(graph):
    gather = node_of(graph, "Gather")
    graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    add = helper.make_node("Add", [gather.input[0], "one"], ["moved"], name="position")
    gather.input[0] = "moved"
    replace(graph, gather, add, onnx.NodeProto.FromString(gather.SerializeToString()))


def _norm(graph):
    gather = node_of(graph, "Gather", -1)
    graph.initializer.append(numpy_helper.from_array(np.ones(24, np.float32), "scale"))
    norm = helper.make_node("LayerNormalization", ["back", "scale"], list(gather.output), name="norm")
    gather.output[0] = "back"
    graph.node.append(norm)


def _bias(graph):
    conv = node_of(graph, "Conv")
    graph.initializer.append(numpy_helper.from_array(np.ones(32, np.float32), "bias"))
    conv.input.append("bias")


def _turned(graph):
    gather = node_of(graph, "Gather")
    turn = helper.make_node("Transpose", [gather.input[0]], ["turned"], perm=[0, 2, 1], name="turn")
    back = helper.make_node("Reshape", ["turned", "merged_shape"], ["back"])
    gather.input[0] = "back"
    replace(graph, gather, turn, back, onnx.NodeProto.FromString(gather.SerializeToString()))


def _halved(graph):
    conv = node_of(graph, "Conv")
    down = helper.make_node("Cast", [conv.input[0]], ["half"], to=onnx.TensorProto.FLOAT16, name="half")
    up = helper.make_node("Cast", ["half"], ["again"], to=onnx.TensorProto.FLOAT)
    conv.input[0] = "again"
    replace(graph, conv, down, up, onnx.NodeProto.FromString(conv.SerializeToString()))


def _leak(graph):
    """The device's part also takes something that the host did not hand over."""
    gather = node_of(graph, "Gather", -1)
    zero = numpy_helper.from_array(np.zeros((240, 24), np.float32), "nothing")
    graph.initializer.append(zero)
    side = [
        helper.make_node("Slice", ["pixel_values", "begin", "end", "axis"], ["some"], name="side"),
        helper.make_node("Slice", ["some", "begin", "sixty", "rows"], ["few"]),
        helper.make_node("Add", [gather.input[0], "few"], ["mixed"], name="mixed"),
    ]
    for name, value in {"begin": 0, "end": 24, "axis": 1, "sixty": 60, "rows": 0}.items():
        graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    gather.input[0] = "mixed"
    replace(graph, gather, *side, onnx.NodeProto.FromString(gather.SerializeToString()))


STRANGE = {
    "add before": (_add, "Add 'position'"),
    "norm after": (_norm, "LayerNormalization 'norm'"),
    "bias": (_bias, "Conv '/patch_embed/proj/Conv'"),
    "transpose": (_turned, "Transpose 'turn'"),
    "half precision": (_halved, "Cast 'half'"),
    "a second way in": (_leak, "Slice 'side'"),
}


@pytest.mark.parametrize(("change", "operator"), STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("layout", ["rai", "directory"])
def test_other_operators_around_the_device_are_refused_with_their_names(tiny, tmp_path, layout, change, operator):
    folder = folder_of(tiny, tmp_path / "folder", layout=layout)
    edit(folder, change)
    onnx.checker.check_model(folder / "vision.onnx", full_check=True)
    refused(tiny, folder, operator)


def test_a_git_lfs_pointer_is_refused_with_the_cure(tiny, folder):
    (folder / "vision.rai").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(tiny, folder, "Git LFS pointer.*git lfs pull")


def test_a_small_artifact_is_taken_with_a_warning_and_an_empty_one_refused(tiny, folder, tmp_path):
    from visionaccel.encoder import open_tower
    from visionaccel_flexmlrt.vitisai import ImportRequest, import_vitisai

    (folder / "vision.rai").write_bytes(b"RAI?")
    (warning,) = import_vitisai(open_tower(tiny), [ImportRequest(folder)], tmp_path / "bundle").warnings
    assert "has only 4 bytes" in warning
    (folder / "vision.rai").write_bytes(b"")
    refused(tiny, folder, "is empty")


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


INFO, TABLE = "vaiml_par_0/partition-info.json", "vaiml_par_0/0/flexmlrt-hsi.json"
CONNECTIVITY = "connectivity_metadata.json"
WRONG = {
    "not ended": (INFO, lambda v: v.update(status="failed"), "status is 'failed'"),
    "on the CPU": (INFO, lambda v: v.update(runner_type="cpu"), "no partition runs on the device"),
    "no runner": (INFO, lambda v: v.pop("runner_type"), r"partition-info\.json.*runner_type: Field required"),
    "dtype": (TABLE, lambda v: v["inputs"][0].update(cpu_dtype="bf16"), r"inputs\.0\.cpu_dtype is 'bf16'"),
    "no name": (TABLE, lambda v: v["outputs"][0].pop("tensor_name"), r"outputs\.0\.tensor_name: Field required"),
    "no output": (TABLE, lambda v: v.update(outputs=[]), "outputs: "),
    "shape": (TABLE, lambda v: v["inputs"][0].update(cpu_shape=["60", 4, 32]), r"inputs\.0\.cpu_shape"),
    "another shape": (TABLE, lambda v: v["inputs"][0].update(cpu_shape=[60, 2, 64]), "graph_edges does not list"),
    "another model": (TABLE, lambda v: v["inputs"][0].update(tensor_name="x"), "tensor 'x' is not in"),
    "another partition": (
        CONNECTIVITY, lambda v: v["execution_order"].append("vaiml_par_1"), "vaiml_par_1, but the folder contains"
    ),
    "no edges": (CONNECTIVITY, lambda v: v.pop("graph_edges"), "graph_edges: Field required"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "change", "match"), WRONG.values(), ids=WRONG)
def test_wrong_metadata_are_refused_by_file_and_field(tiny, cache, file, change, match):
    change_json(cache / "vision_cache" / file, change)
    refused(tiny, cache, match)


def test_a_shape_that_only_the_device_has_is_refused(tiny, cache):
    change_json(cache / "vision_cache" / TABLE, lambda v: v["outputs"][0].update(cpu_shape=[30, 48]))
    (cache / "vision_cache" / CONNECTIVITY).unlink()
    refused(tiny, cache, r"the device has .*\[30, 48\]")


@pytest.mark.parametrize("file", [INFO, TABLE])
def test_absent_and_broken_metadata_are_refused(tiny, cache, file):
    path = cache / "vision_cache" / file
    path.write_text("{")
    refused(tiny, cache, path.name)
    path.write_bytes(b" " * (17 * 2**20))
    refused(tiny, cache, "larger than")
    path.unlink()
    refused(tiny, cache, path.name)


def test_several_partitions_on_the_device_are_refused_by_name(tiny, cache):
    shutil.copytree(cache / "vision_cache" / "vaiml_par_0", cache / "vision_cache" / "vaiml_par_1")
    refused(tiny, cache, "vaiml_par_0, vaiml_par_1")
    change_json(cache / "vision_cache" / "vaiml_par_1" / "partition-info.json", lambda v: v.update(runner_type="cpu"))
    imported(tiny, cache, cache.parent / "bundle")


def test_files_that_are_none_and_folders_without_an_artifact_are_refused(tiny, folder, cache, tmp_path):
    refused(tiny, tmp_path / "folder" / "nothing", "does not exist", ConfigurationError)
    refused(tiny, folder, "'?missing.rai'? does not exist", ConfigurationError, artifact=tmp_path / "missing.rai")
    (folder / "vision.rai").unlink()
    refused(tiny, folder, "nothing compiled from it", ConfigurationError)
    (cache / "vision.onnx").unlink()
    refused(tiny, cache, r"contains no \.onnx", ConfigurationError)


def linked(file, target):
    """A link in the place of a file, which is moved."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)
    file.symlink_to(target)


@pytest.mark.parametrize("name", ["vision.rai", "vision.onnx", "vision.onnx.data"])
def test_links_out_of_the_folder_are_refused(tiny, folder, tmp_path, name):
    linked(folder / name, tmp_path / "elsewhere" / name)
    refused(tiny, folder, rf"{name} points to .*elsewhere/{name}, outside of")
    (folder / name).unlink()
    (tmp_path / "elsewhere" / name).rename(folder / name)
    linked(folder / name, folder / "inner" / name)
    imported(tiny, folder, tmp_path / "bundle")
    assert not list((tmp_path / "bundle").rglob("*.onnx"))


def test_links_out_of_a_partition_are_refused(tiny, cache, tmp_path):
    partition = cache / "vision_cache" / "vaiml_par_0"
    (tmp_path / "hostname").write_text("this machine")
    (partition / "0" / "name").symlink_to(tmp_path / "hostname")
    refused(tiny, cache, "name points to .*hostname, outside of")
    refused(tiny, cache, "name points to .*hostname, outside of", artifact=partition)
    (partition / "0" / "name").unlink()
    (partition / "0" / "name").symlink_to(cache / "vision.onnx")
    imported(tiny, cache, tmp_path / "bundle")
    copy = tmp_path / "bundle" / "20x12" / "vaiml_par_0" / "0" / "name"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (cache / "vision.onnx").read_bytes()


@pytest.mark.parametrize("where", ["vaiml_par_0", "vaiml_par_0/0", "vaiml_par_0/more"])
def test_links_to_folders_are_refused(tiny, cache, tmp_path, where):
    folder, target = cache / "vision_cache" / where, cache / "other" / "inner"
    folder.mkdir(exist_ok=True)
    linked(folder, target)
    refused(tiny, cache, "is a link to another folder")


@pytest.mark.parametrize("layout", ["rai", "directory"])
def test_the_links_of_a_hugging_face_cache_are_followed_into_its_own_blobs_only(tiny, tmp_path, layout):
    repository = tmp_path / "models--amd--tower"
    made = folder_of(tiny, repository / "snapshots" / "12ab" / "npu", layout=layout)
    for number, file in enumerate([file for file in made.rglob("*") if file.is_file()]):
        linked(file, repository / "blobs" / f"{number}")
    bundle = imported(tiny, made, tmp_path / "bundle")
    assert not [file for file in bundle.folder.rglob("*") if file.is_symlink()]
    linked(repository / "blobs" / "0", tmp_path / "models--amd--other" / "blobs" / "0")
    for number in range(1, 3):
        linked(repository / "blobs" / f"{number}", tmp_path / "models--amd--other" / "blobs" / f"{number}")
    output = tmp_path / "refused"
    with pytest.raises(BundleError, match=r"points to .*models--amd--other"):
        imported(tiny, made, output)
    assert not output.exists()


def test_weights_elsewhere_than_beside_the_model_are_not_read(tiny, folder):
    for location in ("../secret", "/etc/passwd", "a/../b", "nothing.data"):

        def point(graph, location=location):
            tensor = constant_of(graph, "patch_embed.proj.weight")
            next(item for item in tensor.external_data if item.key == "location").value = location

        edit(folder, point)
        refused(tiny, folder, "not a plain file name|does not exist")


def test_a_bundle_does_not_replace_what_it_is_made_of(tiny, folder):
    with pytest.raises(ConfigurationError, match="would be replaced"):
        imported(tiny, folder, folder)
    assert (folder / "vision.rai").exists()


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    return folder_of(tiny, tmp_path_factory.mktemp("damage") / "cache", layout="directory")


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_models_and_metadata_give_this_packages_errors_only(tiny, made, data):
    whole = {path: path.read_bytes() for path in (made / "vision.onnx", *(made / "vision_cache").rglob("*.json"))}
    path = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[path])
    if data.draw(st.booleans(), "truncate"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    output = made.parent / "bundle"
    try:
        path.write_bytes(content)
        chosen = data.draw(st.sampled_from([None, PORTRAIT]), "grid")
        imported(tiny, made, output, host_on_onnxrt=data.draw(st.booleans()), grid=chosen)
    except VisionAccelError:
        pass
    finally:
        path.write_bytes(whole[path])
        shutil.rmtree(output, ignore_errors=True)
