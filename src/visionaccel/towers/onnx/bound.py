"""Programs of fixed shapes in ONNX Runtime's fused operators: the graph for any grid, with its tables bound.

Standard operators hold the scores of an attention in memory, where one fused operator works through them piece by
piece. What the graph for any grid takes as inputs is a constant here for `FixedGrid`, and for `Bucket` it is made from
the padded inputs, cut to the rows that are real: padding costs nothing but its place in the inputs and outputs.
"""

from __future__ import annotations

import numpy as np
import onnx

from visionaccel.core.program import AnyGrid, Bucket, FixedGrid
from visionaccel.core.tower_spec import TowerSpec
from visionaccel.towers.onnx.writer import GraphWriter
from visionaccel.towers.signature import EMBEDDINGS, PIXELS, signature
from visionaccel.towers.tables import make_tables

__all__ = ["bind_tables", "pad_embeddings"]

_HIDING = -1.0
"""Terms below it hide a key: the host adds 0 to the scores of real ones, and a large negative number to others."""


def bind_tables(spec: TowerSpec, g: GraphWriter, coverage: FixedGrid | Bucket) -> dict[str, str]:
    """Values by the names of the inputs that they stand for; for a bucket, `EMBEDDINGS` is how those are padded."""
    names = [tensor.name for tensor in signature(spec, AnyGrid(), None)[0]]
    if isinstance(coverage, FixedGrid):
        tables = make_tables(spec, [coverage.grid]).fed()
        return {**{name: g.constant(tables[name]) for name in names if name in tables}, "frames": g.constant([1])}
    return _cut_to_real(spec, g, coverage, names)


def pad_embeddings(g: GraphWriter, embeddings: str, pads: str) -> str:
    """Embeddings with zero rows up to the sizes of a bucket."""
    return g.node("Pad", [embeddings, pads])


def _cut_to_real(spec: TowerSpec, g: GraphWriter, bucket: Bucket, names: list[str]) -> dict[str, str]:
    zero, one, first = g.constant([0]), g.constant([1]), g.constant(np.float32(_HIDING))
    patches = _count(g, g.node("Greater", ["frame_bias", first]))
    tokens = g.node("Div", [patches, g.constant([spec.merged])])

    def cut(value: str, rows: str, axis: str = zero) -> str:
        return g.node("Slice", [value, zero, rows, axis])

    bound = {name: cut(name, patches) for name in (PIXELS, "rotary_cos", "rotary_sin")}
    bound |= {name: cut(name, patches, one) for name in ("position_index", "position_weight") if name in names}
    if spec.window is not None:
        kept = g.node("Squeeze", [g.node("Greater", ["window_bias", first]), one])
        # A window's real patches come first, so a window without any is padding.
        starts = g.node("Slice", [kept, zero, one, one])
        windows = _count(g, g.node("Squeeze", [starts, one]))
        bound |= {name: cut(name, tokens) for name in ("window_index", "reverse_index")}
        bound["window_slots"] = cut("window_slots", patches)
        bound["window_patches"] = cut("window_patches", windows)
        bound["window_mask"] = cut(g.node("Cast", [kept], to=onnx.TensorProto.INT32), windows)
    missing = g.node("Sub", [g.constant([bucket.patches // spec.merged]), tokens])
    pads = g.node("Concat", [g.constant([0, 0]), missing, zero], axis=0)
    return {**bound, "frames": one, EMBEDDINGS: pads}


def _count(g: GraphWriter, flags: str) -> str:
    """How many of a vector's flags are set, as int64 [1]."""
    numbers = g.node("Cast", [flags], to=onnx.TensorProto.INT64)
    return g.node("ReduceSum", [numbers, g.constant([0])], keepdims=1)
