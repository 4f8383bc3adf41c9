"""Programs of fixed shapes in ONNX Runtime's fused operators: the graph for every grid, with its tables bound.

Standard operators hold the scores of an attention in memory, where one fused operator works through them piece by
piece. What the graph for every grid takes as inputs is a constant here for `FixedGrid`, and for `Bucket` it is made
from the padded inputs, cut to the rows that are real: padding costs nothing but its place in the inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from visionaccel.core.program import AnyGrid, Bucket, FixedGrid
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.towers.onnx.graph import write_graph
from visionaccel.towers.onnx.writer import GraphWriter, value_info
from visionaccel.towers.signature import EMBEDDINGS, PIXELS, signature
from visionaccel.towers.tables import make_tables

__all__ = ["write_bound_graph"]

_HIDING = -1.0
"""Terms below it hide a key: the host adds 0 to the scores of real ones, and a large negative number to others."""

_REAL = f"real.{EMBEDDINGS}"


def write_bound_graph(
    config: VisionConfig, weights: Mapping[str, StoredTensor], writer: GraphWriter, coverage: FixedGrid | Bucket
) -> onnx.ModelProto:
    """Write the tower for a grid or for the grids of a bucket; inputs and outputs are those of the standard operators'.

    Args:
        config: Sizes of the tower.
        weights: The tower's tensors by their names below the prefix.
        writer: An empty writer.
        coverage: The grid whose tables are bound, or the sizes that they are padded to.

    Raises:
        CheckpointError: If a weight is missing, or has another shape or dtype than the configuration demands.
    """
    if isinstance(coverage, FixedGrid):
        bound, pads = _constants(config, writer, coverage), None
    else:
        bound, pads = _cut_to_real(config, writer, coverage)
    before = writer.written
    model = write_graph(config, weights, writer, "microsoft")
    for node in model.graph.node[before:]:
        for place, name in enumerate(node.input):
            node.input[place] = bound.get(name, name)
        if pads is not None and node.output[0] == EMBEDDINGS:
            node.output[0] = _REAL
    if pads is not None:
        model.graph.node.append(onnx.helper.make_node("Pad", [_REAL, pads], [EMBEDDINGS], name="Pad.embeddings"))
    inputs, outputs = signature(config, coverage, None)
    for values, specs in ((model.graph.input, inputs), (model.graph.output, outputs)):
        del values[:]
        values.extend(value_info(spec) for spec in specs)
    return model


def _constants(config: VisionConfig, g: GraphWriter, coverage: FixedGrid) -> dict[str, str]:
    """Tables of one grid by the names of the inputs that they stand for."""
    tables = make_tables(config, [coverage.grid])
    names = [spec.name for spec in signature(config, AnyGrid(), None)[0] if spec.name not in (PIXELS, "frames")]
    return {**{name: g.constant(getattr(tables, name)) for name in names}, "frames": g.constant([1])}


def _cut_to_real(config: VisionConfig, g: GraphWriter, bucket: Bucket) -> tuple[dict[str, str], str]:
    """Values that stand for the inputs of the graph for every grid, and how its output is padded to the bucket's."""
    zero, first = g.constant([0]), g.constant(np.float32(_HIDING))
    patches = _count(g, g.node("Greater", ["frame_bias", first]))
    tokens = g.node("Div", [patches, g.constant([config.merged_patches])])
    kept = g.node("Squeeze", [g.node("Greater", ["window_bias", first]), g.constant([1])])
    # A window's real patches come first, so a window without any is padding.
    starts = g.node("Slice", [kept, zero, g.constant([1]), g.constant([1])])
    windows = _count(g, g.node("Squeeze", [starts, g.constant([1])]))

    def cut(value: str, rows: str) -> str:
        return g.node("Slice", [value, zero, rows, zero])

    bound = {
        **{name: cut(name, patches) for name in (PIXELS, "window_slots", "rotary_cos", "rotary_sin")},
        **{name: cut(name, tokens) for name in ("window_index", "reverse_index")},
        "window_patches": cut("window_patches", windows),
        "window_mask": cut(g.node("Cast", [kept], to=onnx.TensorProto.INT32), windows),
        "frames": g.constant([1]),
    }
    missing = g.node("Sub", [g.constant([bucket.patches // config.merged_patches]), tokens])
    return bound, g.node("Concat", [g.constant([0, 0]), missing, zero], axis=0)


def _count(g: GraphWriter, flags: str) -> str:
    """How many of a vector's flags are set, as int64 [1]."""
    numbers = g.node("Cast", [flags], to=onnx.TensorProto.INT64)
    return g.node("ReduceSum", [numbers, g.constant([0])], keepdims=1)
