"""Writes folders in the layouts of AMD's Vitis AI compiler, for tests and for simulators of its runtime.

The layout `rai` is the published one, with three files in one folder:

    vision.rai  vision.onnx  vision.onnx.data

`directory` is the compiler's cache next to the model that it compiled:

    vision.onnx  vision.onnx.data
    vision_cache/
      connectivity_metadata.json
      vaiml_par_0/partition-info.json
      vaiml_par_0/simulator.rai
      vaiml_par_0/0/flexmlrt-hsi.json

The `.onnx` is the whole tower with transformers' operators in their order: convolution, learned positions, window
gather, blocks and merger, reverse gather. The device's partition is the blocks and the merger, what is between the two
gathers of a tower with windows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from visionaccel.core.dtypes import DTYPES
from visionaccel.core.grid import Grid
from visionaccel.core.onnx_graphs import ExternalData, is_external, point_at
from visionaccel.core.program import PIXELS, FixedGrid, HostSplit
from visionaccel.core.tower_spec import Linear
from visionaccel.errors import UnsupportedArchitectureError
from visionaccel.families import Tower
from visionaccel.towers import make_tables
from visionaccel_flexmlrt.artifact import SIMULATOR_FILE

WindowOrder: TypeAlias = Literal["raster", "grouped"]

DEVICE_INPUT, DEVICE_OUTPUT, EMBEDDINGS = "device_input", "device_output", "image_embeddings"
"""The partition's input and output, and the graph's output. The graph's input is `PIXELS`."""

_ALIGNMENT = 64
_CHUNK = 1 << 24


def write_vitisai_folder(
    tower: Tower,
    folder: Path,
    grid: Grid,
    *,
    layout: Literal["rai", "directory"],
    compile: Callable[[Path, Path], object],  # noqa: A002 - it says what the function does
    window_order: WindowOrder = "raster",
    metadata: bool = False,
) -> Path:
    """Write the folder that the compiler would write for one grid.

    Args:
        tower: A tower whose embedded patches are not normalised. Its weights are copied; holes in their files stay
            holes.
        folder: The folder to write; made if it does not exist.
        grid: One frame.
        layout: A single file, or the compiler's cache.
        compile: Called once with the partition as an ONNX file, whose weights are external data in one file next to it,
            and with the file to write: the `.rai`, or `simulator.rai` in the partition's folder. The partition's input
            is `DEVICE_INPUT`, float32 [tokens, merged, hidden], its output `DEVICE_OUTPUT`, float32 [tokens,
            out_width], both in window order if there are windows. The ONNX files are deleted after the call.
        window_order: Order of the windows; `raster` without windows.
        metadata: Also write `flexmlrt-hsi.json` next to a `.rai`.

    Returns:
        The artifact: the `.rai`, or `partition-info.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partition = _partition(tower, grid, window_order)
    whole = _whole(tower, grid, window_order, partition)
    _pack_weights(whole, tower.weights_folder, folder / "vision.onnx.data")
    (folder / "vision.onnx").write_bytes(whole.SerializeToString())
    tensors = _device_tensors(partition)
    artifact = target = folder / "vision.rai"
    if layout == "directory":
        cache = folder / "vision_cache"
        artifact, target = (cache / "vaiml_par_0" / name for name in ("partition-info.json", SIMULATOR_FILE))
        _write_cache(cache, whole, partition, tensors)
    elif metadata:
        _write_json(folder / "flexmlrt-hsi.json", tensors)
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=folder) as work:
        model = Path(work, "partition.onnx")
        _pack_weights(partition, tower.weights_folder, model.with_suffix(".onnx.data"))
        model.write_bytes(partition.SerializeToString())
        compile(model, target)
    return artifact


def _partition(tower: Tower, grid: Grid, order: WindowOrder) -> onnx.ModelProto:
    """Return the device's part, in float32."""
    coverage, host = FixedGrid(grid), HostSplit(order)
    model = onnx.load_model_from_string(tower.onnx_model(coverage=coverage, host=host))
    (first,), (last,) = tower.signature(coverage, host)
    renamed = {first.name: DEVICE_INPUT, last.name: DEVICE_OUTPUT}
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [renamed.get(value, value) for value in values]
    for value in (*model.graph.input, *model.graph.output):
        value.name = renamed[value.name]
    return model


def _whole(tower: Tower, grid: Grid, order: WindowOrder, partition: onnx.ModelProto) -> onnx.ModelProto:
    """Return the whole tower, with the partition's operators in it."""
    spec = tower.spec
    first, *norms = spec.embed
    assert isinstance(first, Linear), "TowerSpec checks it"
    if norms:
        raise UnsupportedArchitectureError(
            f"a tower of family {tower.family!r} has a norm after its patch embedding, which these artifacts cannot "
            "have.",
            hint="Compile the program of a split bundle instead; its host part computes the norm.",
        )
    tables = make_tables(spec, [grid], grouped=order == "grouped")
    patches, hidden, merged = grid.patches, spec.hidden, spec.merged
    side, steps = spec.patch, spec.temporal
    constants: dict[str, Any] = {
        "blocks_shape": [-1, spec.channels, steps, side, side],
        "rows_shape": [-1, hidden],
        "merged_shape": [patches // merged, merged, hidden],
    }
    weights: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        name = output.removesuffix("_output_0")
        nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    embedding = []
    for part in ("weight", "bias") if first.bias else ("weight",):
        name = f"{first.name}.{part}"
        stored = tower.weights[name]
        weights.append(TensorProto(name=name, data_type=DTYPES[stored.dtype].onnx, dims=stored.shape))
        point_at(weights[-1], ExternalData.at(stored, tower.weights_folder))
        if stored.dtype != "float32":
            name = add("Cast", [name], f"/patch_embed/proj/{part}/Cast_output_0", to=TensorProto.FLOAT)
        embedding.append(name)
    rows = add("Reshape", [PIXELS, "blocks_shape"], "/patch_embed/Reshape_output_0")
    window = [steps, side, side]
    rows = add("Conv", [rows, *embedding], "/patch_embed/proj/Conv_output_0", strides=window, kernel_shape=window)
    rows = add("Reshape", [rows, "rows_shape"], "/patch_embed/Reshape_1_output_0")
    if spec.positions is not None:
        table = tower.weights[f"{spec.positions.name}.weight"].read().astype(np.float32)
        added = (table[tables["position_index"]] * tables["position_weight"]).sum(axis=0, dtype=np.float32)
        weights.append(numpy_helper.from_array(added, "positions"))
        rows = add("Add", [rows, "positions"], "/Add_output_0")
    windowed = spec.window is not None
    rows = add("Reshape", [rows, "merged_shape"], "/blocks/Reshape_output_0" if windowed else DEVICE_INPUT)
    if windowed:
        constants |= {name: tables[name] for name in ("window_index", "reverse_index")}
        add("Gather", [rows, "window_index"], DEVICE_INPUT, axis=0)
    nodes += partition.graph.node
    if windowed:
        add("Gather", [DEVICE_OUTPUT, "reverse_index"], EMBEDDINGS, axis=0)
    else:
        add("Identity", [DEVICE_OUTPUT], EMBEDDINGS)
    graph = helper.make_graph(
        nodes,
        "main_graph",
        [helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, [patches, spec.patch_width])],
        [helper.make_tensor_value_info(EMBEDDINGS, TensorProto.FLOAT, [patches // merged, tower.out_width])],
        [
            *(numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in constants.items()),
            *weights,
            *partition.graph.initializer,
        ],
        value_info=[*partition.graph.input, *partition.graph.output],
    )
    return helper.make_model(graph, opset_imports=partition.opset_import, ir_version=partition.ir_version)


def _pack_weights(model: onnx.ModelProto, source: Path, target: Path) -> None:
    """Copy the weights that a model refers to into one file, and make the model refer to it."""
    end = 0
    with target.open("wb") as written:
        for tensor in filter(is_external, model.graph.initializer):
            origin = ExternalData.of(tensor)
            assert origin.length is not None
            with (source / origin.location).open("rb") as read:
                for start in range(0, origin.length, _CHUNK):
                    read.seek(origin.offset + start)
                    piece = read.read(min(_CHUNK, origin.length - start))
                    if np.frombuffer(piece, np.uint8).any():
                        written.seek(end + start)
                        written.write(piece)
            point_at(tensor, ExternalData(target.name, end, origin.length))
            end += -(-origin.length // _ALIGNMENT) * _ALIGNMENT
        written.truncate(end)


def _device_tensors(partition: onnx.ModelProto) -> dict[str, Any]:
    """Return the content of `flexmlrt-hsi.json`: the tensors at the device's edges."""

    def entry(value: onnx.ValueInfoProto, name: str) -> dict[str, Any]:
        return {
            "name": f"compute_graph.{name}",
            "tensor_name": value.name,
            "cpu_shape": _shape(value),
            "cpu_dtype": "fp32",
            "hw_shape": _shape(value),
            "hw_dtype": "bf16",
            "scale_factor": 1.0,
        }

    return {
        "inputs": [entry(value, "ifm_ddr") for value in partition.graph.input],
        "outputs": [entry(value, "ofm_ddr") for value in partition.graph.output],
    }


def _write_cache(cache: Path, whole: onnx.ModelProto, partition: onnx.ModelProto, tensors: Mapping[str, Any]) -> None:
    device, before, after = "vaiml_par_0", "vaiml_cpu_subgraph_0", "vaiml_cpu_subgraph_1"
    (cache / device / "0").mkdir(parents=True, exist_ok=True)
    ends = (*whole.graph.input, *partition.graph.input, *partition.graph.output, *whole.graph.output)
    route = ("__graph_input__", before, device, after, "__graph_output__")
    edges = [
        {"source_partition": source, "destination_partition": goal, "shape": _shape(value), "data_type": "float32"}
        for source, goal, value in zip(route[:-1], route[1:], ends, strict=True)
    ]
    connectivity = {
        "execution_order": [before, device, after],
        "inputs": [PIXELS],
        "outputs": [EMBEDDINGS],
        "graph_edges": edges,
    }
    _write_json(cache / "connectivity_metadata.json", connectivity)
    info = {"runner_type": "hw", "status": "completed", "num_aie_partitions": 1, "name": device}
    _write_json(cache / device / "partition-info.json", info)
    _write_json(cache / device / "0" / "flexmlrt-hsi.json", tensors)


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
