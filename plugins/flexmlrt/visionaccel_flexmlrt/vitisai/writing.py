"""Folders as AMD's Vitis AI compiler leaves them, made from a tower: for tests, and for simulators of its runtime.

Two layouts are written. `rai` is the published one, three files side by side:

    vision.rai  vision.onnx  vision.onnx.data

`directory` is a cache of the compiler next to the model that it compiled:

    vision.onnx  vision.onnx.data
    vision_cache/
      preliminary-vaiml-pass-summary.txt  original_graph_nodes.json  connectivity_metadata.json
      vaiml_par_0/partition-info.json
      vaiml_par_0/simulator.rai
      vaiml_par_0/0/flexmlrt-hsi.json

The `.onnx` is the whole tower in the operators and the order of transformers: convolution, window gather, blocks and
merger, reverse gather. What lies between the two gathers is the device's partition. A caller's `compile` gets it as a
separate ONNX model, and writes what stands for the compiled binary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from visionaccel.core.dtypes import DTYPES
from visionaccel.core.grid import Grid
from visionaccel.core.onnx_graphs import ExternalData, is_external, point_at
from visionaccel.core.program import PIXELS, FixedGrid, HostSplit, Precision
from visionaccel.families import Tower
from visionaccel.towers import make_tables
from visionaccel_flexmlrt.artifact import SIMULATOR_FILE

_Row: TypeAlias = tuple[str, list[str], str, dict[str, Any]]
"""An operator, its inputs, its output and its attributes."""

_ALIGNMENT = 64
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class VitisNames:
    """Names in a folder.

    Attributes:
        stem: Name of the `.rai`, `.onnx` and `.onnx.data`.
        pixels: The graph's input.
        device_input: What the device's partition takes.
        device_output: What it gives.
        embeddings: The graph's output.
    """

    stem: str = "vision"
    pixels: str = PIXELS
    device_input: str = "device_input"
    device_output: str = "device_output"
    embeddings: str = "image_embeddings"


def write_vitisai_folder(
    tower: Tower,
    folder: Path,
    grid: Grid,
    *,
    layout: Literal["rai", "directory"],
    window_order: Literal["raster", "grouped"] = "raster",
    compile: Callable[[Path, Path], object],  # noqa: A002 - it is what the function does
    precision: Precision = "float32",
    names: VitisNames | None = None,
    metadata: bool = False,
) -> Path:
    """Write what the compiler leaves for the program of one grid.

    Args:
        tower: A Qwen2.5-VL tower; its weights are copied, and holes in their files stay holes.
        folder: Where to; made if it does not exist.
        grid: One frame.
        layout: A single file, or the compiler's cache.
        window_order: Order of the windows that the two gathers make.
        compile: Called once with the partition as an ONNX file, whose weights are external data in one file next to it,
            and with the file to write: the `.rai`, or `simulator.rai` in the partition's folder. The partition takes
            `names.device_input`, float32 [tokens, merged, hidden], and gives `names.device_output`, float32 [tokens,
            out_width], both in window order. Its files are gone after the call.
        precision: Dtype of the partition's weights and activations.
        names: Names of files and tensors.
        metadata: Write `flexmlrt-hsi.json` next to a `.rai` too.

    Returns:
        The artifact: the `.rai`, or `partition-info.json`.
    """
    names = names or VitisNames()
    folder.mkdir(parents=True, exist_ok=True)
    partition = _partition(tower, grid, window_order, precision, names)
    whole = _whole(tower, grid, window_order, partition, names)
    _pack_weights(whole, tower.weights_folder, folder / f"{names.stem}.onnx.data")
    (folder / f"{names.stem}.onnx").write_bytes(whole.SerializeToString())
    tensors = _device_tensors(partition)
    artifact = target = folder / f"{names.stem}.rai"
    if layout == "directory":
        cache = folder / f"{names.stem}_cache"
        artifact, target = (cache / "vaiml_par_0" / name for name in ("partition-info.json", SIMULATOR_FILE))
        _write_cache(cache, whole, partition, tensors, names)
    elif metadata:
        _write_json(folder / "flexmlrt-hsi.json", tensors)
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=folder) as work:
        model = Path(work, "partition.onnx")
        _pack_weights(partition, tower.weights_folder, model.with_suffix(".onnx.data"))
        model.write_bytes(partition.SerializeToString())
        compile(model, target)
    return artifact


def _partition(
    tower: Tower, grid: Grid, order: Literal["raster", "grouped"], precision: Precision, names: VitisNames
) -> onnx.ModelProto:
    """What runs on the device, under the names at its edges."""
    coverage, host = FixedGrid(grid), HostSplit(order)
    model = onnx.load_model_from_string(tower.onnx_model(coverage=coverage, precision=precision, host=host))
    (first,), (last,) = tower.signature(coverage, host)
    renamed = {first.name: names.device_input, last.name: names.device_output}
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [renamed.get(value, value) for value in values]
    for value in (*model.graph.input, *model.graph.output):
        value.name = renamed[value.name]
    return model


def _whole(
    tower: Tower, grid: Grid, order: Literal["raster", "grouped"], partition: onnx.ModelProto, names: VitisNames
) -> onnx.ModelProto:
    """The whole tower around the partition's operators."""
    spec, (kernel_name,) = tower.spec, tower.host_weights
    kernel = tower.weights[kernel_name]
    windows = make_tables(spec, [grid], grouped=order == "grouped").windows
    assert windows is not None, "what compilers were given has windows"
    patches, hidden, merged = grid.patches, spec.hidden, spec.merged
    side, steps = spec.patch, spec.temporal
    constants = {
        "blocks_shape": [-1, spec.channels, steps, side, side],
        "rows_shape": [-1, hidden],
        "merged_shape": [patches // merged, merged, hidden],
        "window_index": windows.index,
        "reverse_index": windows.reverse,
    }
    weight = _external(kernel_name, kernel, tower.weights_folder)
    exact, widened = kernel.dtype == "float32", "/patch_embed/proj/Cast_output_0"
    before: list[_Row] = [
        *([] if exact else [("Cast", [kernel_name], widened, {"to": TensorProto.FLOAT})]),
        ("Reshape", [names.pixels, "blocks_shape"], "/patch_embed/Reshape_output_0", {}),
        (
            "Conv",
            ["/patch_embed/Reshape_output_0", kernel_name if exact else widened],
            "/patch_embed/proj/Conv_output_0",
            {"strides": [steps, side, side], "kernel_shape": [steps, side, side]},
        ),
        ("Reshape", ["/patch_embed/proj/Conv_output_0", "rows_shape"], "/patch_embed/Reshape_1_output_0", {}),
        ("Reshape", ["/patch_embed/Reshape_1_output_0", "merged_shape"], "/blocks/Reshape_output_0", {}),
        ("Gather", ["/blocks/Reshape_output_0", "window_index"], names.device_input, {"axis": 0}),
    ]
    after: list[_Row] = [("Gather", [names.device_output, "reverse_index"], names.embeddings, {"axis": 0})]

    def nodes(rows: Iterable[_Row]) -> list[onnx.NodeProto]:
        return [
            helper.make_node(kind, inputs, [output], name=output.removesuffix("_output_0"), **attributes)
            for kind, inputs, output, attributes in rows
        ]

    graph = helper.make_graph(
        [*nodes(before), *partition.graph.node, *nodes(after)],
        "main_graph",
        [helper.make_tensor_value_info(names.pixels, TensorProto.FLOAT, [patches, spec.patch_width])],
        [helper.make_tensor_value_info(names.embeddings, TensorProto.FLOAT, [patches // merged, tower.out_width])],
        [
            *(numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in constants.items()),
            weight,
            *partition.graph.initializer,
        ],
        value_info=[*partition.graph.input, *partition.graph.output],
    )
    return helper.make_model(graph, opset_imports=partition.opset_import, ir_version=partition.ir_version)


def _external(name: str, stored: Any, folder: Path) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=DTYPES[stored.dtype].onnx, dims=stored.shape)
    point_at(tensor, ExternalData.at(stored, folder))
    return tensor


def _pack_weights(model: onnx.ModelProto, source: Path, target: Path) -> None:
    """Copy the weights that a model refers to into one file, and make it refer to that."""
    places: list[tuple[ExternalData, int, int]] = []
    end = 0
    for tensor in filter(is_external, model.graph.initializer):
        place = ExternalData.of(tensor)
        assert place.length is not None
        length = place.length
        places.append((place, length, end))
        point_at(tensor, ExternalData(target.name, end, length))
        end += -(-length // _ALIGNMENT) * _ALIGNMENT
    with target.open("wb") as written:
        for origin, length, begin in places:
            with (source / origin.location).open("rb") as read:
                for start in range(0, length, _CHUNK):
                    read.seek(origin.offset + start)
                    piece = read.read(min(_CHUNK, length - start))
                    if np.frombuffer(piece, np.uint8).any():
                        written.seek(begin + start)
                        written.write(piece)
        written.truncate(end)


def _device_tensors(partition: onnx.ModelProto) -> dict[str, Any]:
    """`flexmlrt-hsi.json`: the tensors at the device's edges."""

    def entry(value: onnx.ValueInfoProto, name: str) -> dict[str, Any]:
        shape = _shape(value)
        return {
            "name": f"compute_graph.{name}",
            "tensor_name": value.name,
            "cpu_shape": shape,
            "cpu_dtype": "fp32",
            "hw_shape": shape,
            "hw_dtype": "bf16",
            "scale_factor": 1.0,
        }

    return {
        "inputs": [entry(value, "ifm_ddr") for value in partition.graph.input],
        "outputs": [entry(value, "ofm_ddr") for value in partition.graph.output],
    }


def _write_cache(
    cache: Path, whole: onnx.ModelProto, partition: onnx.ModelProto, tensors: Mapping[str, Any], names: VitisNames
) -> None:
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
        "inputs": [names.pixels],
        "outputs": [names.embeddings],
        "graph_edges": edges,
    }
    _write_json(cache / "connectivity_metadata.json", connectivity)
    _write_json(cache / "original_graph_nodes.json", [{"name": n.name, "op_type": n.op_type} for n in whole.graph.node])
    count, total = len(partition.graph.node), len(whole.graph.node)
    (cache / "preliminary-vaiml-pass-summary.txt").write_text(
        f"Number of operators in the model: {total}\nNumber of operators supported by VAIML: {count}\n"
        f"Number of subgraphs supported by VAIML: 1\n"
    )
    info = {"runner_type": "hw", "status": "completed", "num_aie_partitions": 1, "name": device}
    _write_json(cache / device / "partition-info.json", info)
    _write_json(cache / device / "0" / "flexmlrt-hsi.json", tensors)


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
