"""Hostile models and compiled artifacts: ONNX files, EPContext, `.rai` files and the compiler's folders."""

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from hostile.kinds import PIPE, Files, Kind
from hostile.seeds import BUNDLE, CHECKPOINT, CONTEXT, GRID, PARTITION, PROVIDER, RAI
from mutations import ODD_NUMBERS, damage, damaged, mutations
from visionaccel.bundle import point_at_weights
from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.program import EP_CONTEXT, FixedGrid, HostSplit, Program
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError, VisionAccelError
from visionaccel.families import Tower
from visionaccel_flexmlrt import FlexMLRTBackend
from visionaccel_flexmlrt.artifact import FLEXMLRT_DIRECTORY, FLEXMLRT_RAI
from visionaccel_flexmlrt.backend import FlexMLRTOptions
from visionaccel_flexmlrt.vitisai import ImportRequest, import_vitisai
from visionaccel_flexmlrt.vitisai.findings import find
from visionaccel_onnxrt.ep_context import offload_of_context, verified_context

MODEL = "vision.onnx"
_CACHE = "vision_cache"
_HEADER = struct.Struct("<8sIIQQQQ")


@cache
def _tower(folder: Path) -> Tower:
    return open_tower(folder)


def read_artifact(folder: Path) -> None:
    """Find out what an artifact is, and take its host part out of the model where it is not known."""
    tower = _tower(folder.parent / CHECKPOINT)
    with suppress(VisionAccelError):
        find(tower, ImportRequest(folder, grid=GRID, host_on_onnxrt=True), tower.weights)
    find(tower, ImportRequest(folder), tower.weights)


def read_and_run(folder: Path) -> None:
    """Import an artifact whole, and open it on the simulator."""
    tower = _tower(folder.parent / CHECKPOINT)
    output = folder.parent / "imported"
    shutil.rmtree(output, ignore_errors=True)
    refusal = None
    try:
        import_vitisai(tower, [ImportRequest(folder)], output)
    except VisionAccelError as error:
        refusal = error
    single = (folder / "vision.rai").exists()
    artifact = folder / "vision.rai" if single else folder / _CACHE / "vaiml_par_0" / "partition-info.json"
    coverage, split = FixedGrid(GRID), HostSplit("raster")
    inputs, outputs = tower.signature(coverage, split)
    program = Program(
        name="hostile", family=tower.family, format=FLEXMLRT_RAI if single else FLEXMLRT_DIRECTORY, folder=folder,
        inputs=inputs, outputs=outputs, weights={}, uniform_frames=True, coverage=coverage,
        precision="float32", host=split, device="simulator", artifact=artifact,
        stored_names={inputs[0].name: "device_input", outputs[0].name: "device_output"},
    )  # fmt: skip
    backend = FlexMLRTBackend()
    backend.probe(program, "simulator")
    backend.open(program, "simulator", FlexMLRTOptions()).close()
    if refusal is not None:
        raise refusal


def read_program(folder: Path) -> None:
    """Point a bundle's model at its weights."""
    tower = _tower(folder.parent / CHECKPOINT)
    try:
        model = read_bounded(folder / MODEL_OF_BUNDLE)
    except (OSError, ValueError) as error:
        raise BundleError("no file") from error
    point_at_weights(model, tower.weights, tower.weights_folder)


def read_context(folder: Path) -> None:
    """Verify a compiled model, and count what is in it."""
    path = folder / MODEL
    program = Program(
        name="hostile", family="qwen2_5_vl", format=EP_CONTEXT, folder=folder, inputs=(), outputs=(),
        weights={}, uniform_frames=True, coverage=FixedGrid(GRID), precision="float32", artifact=path,
        companions={"context.bin": folder / "context.bin"},
    )  # fmt: skip
    offload_of_context(path)
    verified_context(program, PROVIDER)


MODEL_OF_BUNDLE = "10x18.onnx"
NAMES = st.sampled_from(["", "..", "../x", "/etc/passwd", "context.bin", "vision.onnx.data", "a/b", "\0", "x" * 5000])


def _changes(draw: Callable[..., object], model: onnx.ModelProto) -> None:
    """Change a model at one place, so that it stays one."""
    graph = model.graph
    which = draw(
        st.sampled_from(["input", "kind", "attribute", "dims", "data", "place", "value", "drop", "node", "domain"])
    )
    node = graph.node[draw(st.integers(0, len(graph.node) - 1))]
    tensor = graph.initializer[draw(st.integers(0, len(graph.initializer) - 1))] if graph.initializer else TensorProto()
    number = draw(ODD_NUMBERS.filter(lambda n: isinstance(n, int) and -(2**63) <= n < 2**63))
    names = [name for each in graph.node for name in (*each.input, *each.output)]
    if which == "input" and node.input:
        node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from(names))
    elif which == "kind":
        node.op_type = draw(st.sampled_from(["Gather", "Reshape", "Cast", "Conv", "MatMul", "Loop", "If", "EPContext"]))
    elif which == "attribute" and node.attribute:
        attribute = node.attribute[draw(st.integers(0, len(node.attribute) - 1))]
        attribute.i = number
        attribute.type = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7]))
        attribute.s = draw(NAMES).encode()
    elif which == "dims" and tensor.dims:
        tensor.dims[draw(st.integers(0, len(tensor.dims) - 1))] = number
    elif which == "data":
        tensor.raw_data = draw(st.binary(max_size=64))
        tensor.data_type = draw(st.integers(0, 30))
    elif which == "place":
        tensor.data_location = TensorProto.EXTERNAL
        key = draw(st.sampled_from(["location", "offset", "length"]))
        kept = {item.key: item.value for item in tensor.external_data} | {key: draw(NAMES | st.just(str(number)))}
        del tensor.external_data[:]
        for name, value in kept.items():
            tensor.external_data.add(key=name, value=value)
    elif which == "value":
        values = [*graph.input, *graph.output, *graph.value_info]
        value = values[draw(st.integers(0, len(values) - 1))]
        value.type.tensor_type.shape.dim.add().dim_value = number
    elif which == "drop":
        del graph.node[draw(st.integers(0, len(graph.node) - 1))]
    elif which == "node":
        graph.node.add().CopyFrom(node)
    else:
        node.domain = draw(NAMES)


@st.composite
def _models(draw: Callable[..., object], data: bytes) -> bytes:
    if draw(st.booleans()):
        changed = data
        for how in draw(st.lists(damage(len(data) - 1), min_size=1, max_size=3)):
            changed = damaged(changed, *how)
        return changed
    model = onnx.load_model_from_string(data)
    for _ in range(draw(st.integers(1, 3))):
        if model.graph.node:
            _changes(draw, model)
    return model.SerializeToString()


def _of_model(name: str) -> Callable[[Path], st.SearchStrategy[Files]]:
    return lambda folder: _models((folder / name).read_bytes()).map(lambda data: {name: data})


def _crafted_models(name: str) -> Callable[[Path], list[Files]]:
    def craft(folder: Path) -> list[Files]:
        whole = onnx.load_model_from_string((folder / name).read_bytes())
        made = [_doubling(whole), _wide(whole), _deep(30), _many(50_000), _many(200_000)]
        contents: list[bytes | None] = [_nested(40_000), b"", b"\n\xff\xff\xff\xff\x0f", b"\x3a" * 1000, PIPE, None]
        return [*({name: model.SerializeToString()} for model in made), *({name: data} for data in contents)]

    return craft


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    return changed


def _doubling(whole: onnx.ModelProto) -> onnx.ModelProto:
    """A constant that is made of one twice, and so on, in the place of every constant."""
    model = _copied(whole)
    first = numpy_helper.from_array(numpy_helper.to_array(helper.make_tensor("d0", TensorProto.INT64, [1], [1])), "d0")
    nodes = [helper.make_node("Reshape", [f"d{n}", f"d{n}"], [f"d{n + 1}"], name=f"d{n}") for n in range(40)]
    for node in model.graph.node:
        if node.op_type in ("Gather", "Reshape", "Conv") and len(node.input) > 1:
            node.input[1] = "d32"
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    model.graph.initializer.append(first)
    return model


def _wide(whole: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of very many, very large dimensions, and operators of very many axes."""
    model = _copied(whole)
    for tensor in model.graph.initializer:
        del tensor.dims[:]
        tensor.dims.extend([2**62] * 200_000)
    for node in model.graph.node:
        if node.op_type == "Reshape":
            node.op_type = "Unsqueeze"
            node.attribute.append(helper.make_attribute("axes", list(range(100_000))))
            break
    return model


def _nested(depth: int) -> bytes:
    """A message within a message, deeper than parsers of Protocol Buffers go."""
    data = b""
    for _ in range(depth):
        data = b"\x3a" + _varint(len(data)) + data  # field 7 of a model is its graph, of others unknown
    return data


def _varint(number: int) -> bytes:
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def _deep(depth: int) -> onnx.ModelProto:
    """Graphs within graphs."""
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "inner", [], [])
    for number in range(depth):
        graph = helper.make_graph([helper.make_node("If", ["c"], [f"o{number}"], then_branch=graph)], "outer", [], [])
    return helper.make_model(graph)


def _many(count: int) -> onnx.ModelProto:
    """A chain of operators that move nothing."""
    nodes = [helper.make_node("Identity", [f"x{number}"], [f"x{number + 1}"]) for number in range(count)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in ("x0", f"x{count}")]
    return helper.make_model(helper.make_graph(nodes, "chain", values[:1], values[1:]))


def _containers(folder: Path, name: str) -> st.SearchStrategy[Files]:
    """A simulated artifact with another header, another model in it, or damaged at any place."""
    data = (folder / name).read_bytes()
    fields = _HEADER.unpack_from(data)
    text = fields[3] + fields[4]
    numbers = st.sampled_from(
        [0, 1, 47, 48, 4096, len(data) - 1, len(data), len(data) + 1, 2**31, 2**32, 2**63, 2**64 - 1]
    )

    def header(place: int, number: int) -> bytes:
        changed = list(fields)
        changed[place] = number & (0xFFFFFFFF if place < 3 else 2**64 - 1)
        return _HEADER.pack(*changed) + data[_HEADER.size :]

    return st.one_of(
        st.builds(header, st.integers(1, 6), numbers),
        damage(_HEADER.size - 1).map(lambda how: damaged(data, *how)),
        damage(text - 1).map(lambda how: damaged(data, *how)),
        st.integers(0, len(data) - 1).map(lambda length: data[:length]),
        st.binary(max_size=100).map(lambda rest: data[:8] + rest),
    ).map(lambda content: {name: content})


def _partitions(folder: Path) -> st.SearchStrategy[Files]:
    """The compiler's folder with other metadata, without a file, or with something else in its place."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    tables = [name for name in files if name.endswith(".json") and "nodes" not in name]

    def table(name: str) -> st.SearchStrategy[Files]:
        document = json.loads((folder / name).read_text())
        return mutations(document).map(lambda changed: {name: json.dumps(changed).encode()})

    def other(name: str) -> st.SearchStrategy[Files]:
        contents: list[bytes | None] = [None, b"", b"version https://git-lfs.github.com/spec/v1\n", b"{}", b"[]", PIPE]
        return st.sampled_from(contents).map(lambda data: {name: data})

    ways = {
        "table": st.sampled_from(tables).flatmap(table),
        "other": st.sampled_from(files).flatmap(other),
        "artifact": _containers(folder, f"{_CACHE}/vaiml_par_0/simulator.rai"),
    }
    return st.sampled_from(["table", "table", "table", "other", "artifact"]).flatmap(ways.__getitem__)


KINDS = (
    Kind("onnx: of an artifact", RAI, _crafted_models(MODEL), _of_model(MODEL), read_artifact, 1000),
    Kind("onnx: of a bundle", BUNDLE, _crafted_models(MODEL_OF_BUNDLE), _of_model(MODEL_OF_BUNDLE), read_program, 500),
    Kind("onnx: EPContext", CONTEXT, _crafted_models(MODEL), _of_model(MODEL), read_context, 400),
    Kind(
        ".rai",
        RAI,
        lambda _: [{"vision.rai": data} for data in (b"", b"VASIMRAI", b"version https://git-lfs", PIPE, bytes(2**21))],
        lambda folder: _containers(folder, "vision.rai"),
        read_and_run,
        500,
    ),
    Kind("partition's folder", PARTITION, lambda _: [], _partitions, read_and_run, 300),
)
