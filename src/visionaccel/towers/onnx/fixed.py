"""Graphs of fixed shapes: in standard operators for devices that compile ahead of time, and in ONNX Runtime's own.

In standard operators of opset 17 no shape varies (`FixedOperators`). Heads are the leading axis of attention, so that a
run of windows is a reshape away from a batch of them. `FixedGrid` bakes the tables in and runs the windows of one size
as one batch, without any mask. That takes window order `grouped`; a split program with `raster` order at its edges
gathers into it and back. `Bucket` takes the tables as inputs, gathers the rows into windows of full size, and adds a
mask term to the scores.

Standard operators hold the scores of an attention in memory, where one fused operator of ONNX Runtime works through
them piece by piece. In those, what the graph for any grid takes as inputs is a constant for `FixedGrid`, and for
`Bucket` it is made from the padded inputs, cut to the rows that are real (`bind_tables`).
"""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
import onnx

from visionaccel.core.program import EMBEDDINGS, PIXELS, AnyGrid, Bucket, FixedGrid, HostSplit
from visionaccel.core.tower_spec import ActivationKind, Norm, TowerSpec
from visionaccel.towers.host import RASTER
from visionaccel.towers.onnx.operators import Operators
from visionaccel.towers.onnx.writer import GraphWeights, GraphWriter
from visionaccel.towers.tables import Windows, make_tables, signature, window_order


class FixedOperators(Operators):
    """Plain operators. Norms, rotary positions and softmax are float32 in every precision, as in the reference.

    Args:
        spec: The tower.
        writer: The graph.
        weights: Its weights.
        coverage: The grid whose tables are baked in, or the sizes that tables are padded to.
        host: What is left to the host; None for the whole tower.
    """

    opset = 17
    microsoft = False

    def __init__(
        self,
        spec: TowerSpec,
        writer: GraphWriter,
        weights: GraphWeights,
        coverage: FixedGrid | Bucket,
        host: HostSplit | None,
    ) -> None:
        self._patches = coverage.grid.patches if isinstance(coverage, FixedGrid) else coverage.patches
        super().__init__(spec, writer, weights, self._patches)
        self._coverage, self._host = coverage, host
        self._scale = writer.constant(np.float32(spec.head_dim**-0.5))
        self._square_exponent = writer.constant(np.float32(2.0))
        self._baked: dict[str, str] = {}
        self._frame_bias = ""

    def table(self, name: str) -> str:
        return self._baked.get(name, name)

    def prepare(self) -> None:
        if isinstance(self._coverage, FixedGrid):
            self._bake(self._coverage)
        else:
            self._take(self._coverage)

    def _bake(self, coverage: FixedGrid) -> None:
        """Constant tables of one grid. The graph's own order is `grouped`; that at its edges may be another."""
        g, spec = self.g, self.spec
        tables = make_tables(spec, [coverage.grid], grouped=spec.window is not None)
        self._cos = g.constant(np.concatenate([tables.rotary_cos, tables.rotary_cos], axis=1))
        # The first half is negated, so that a rotation swaps halves and negates none.
        self._sin = g.constant(np.concatenate([-tables.rotary_sin, tables.rotary_sin], axis=1))
        if spec.positions is not None and self._host is None:
            fed = tables.fed()
            self._baked = {name: g.constant(fed[name]) for name in ("position_index", "position_weight")}
        if tables.windows is not None:
            lengths = tables.windows.lengths.tolist()
            self._groups = [(size, len(list(same))) for size, same in groupby(lengths)]
            self._order(tables.windows, coverage)

    def _order(self, windows: Windows, coverage: FixedGrid) -> None:
        """The indices between the graph's own order and that at its edges."""
        g = self.g
        if self._host is None:
            self.order_index, self.reverse_index = g.constant(windows.index), g.constant(windows.reverse)
        elif self._host.order == RASTER:
            raster, _ = window_order(self.spec, [coverage.grid])
            if not np.array_equal(raster, windows.index):
                self.order_index = g.constant(np.argsort(raster)[windows.index])
                self.reverse_index = g.constant(windows.reverse[raster])

    def _take(self, bucket: Bucket) -> None:
        """Tables that are inputs, padded to the sizes of a bucket; masks are terms added to the scores."""
        g, spec = self.g, self.spec
        self._cos = g.node("Concat", ["rotary_cos", "rotary_cos"], axis=1)
        self._sin = g.node("Concat", [g.node("Neg", ["rotary_sin"]), "rotary_sin"], axis=1)
        self._frame_bias = "frame_bias"
        if spec.window is not None:
            if self._host is None:
                self.order_index, self.reverse_index = "window_index", "reverse_index"
            shape = g.constant([bucket.sizes["windows"] * spec.window_patches])
            self._window_rows = g.node("Reshape", ["window_patches", shape])

    def norm(self, norm: Norm, x: str, scale: str, bias: str) -> str:
        g = self.g
        x = g.widen(x)
        if norm.kind == "layer":
            inputs = [x, *(value if value == "" else g.widen(value) for value in (scale, bias))]
            return g.narrow(g.node("LayerNormalization", inputs, axis=-1, epsilon=norm.epsilon))
        mean = g.node("ReduceMean", [g.node("Pow", [x, self._square_exponent])], axes=[-1], keepdims=1)
        root = g.node("Sqrt", [g.node("Add", [mean, g.constant(np.float32(norm.epsilon))])])
        return g.node("Mul", [g.narrow(g.node("Div", [x, root])), scale])

    def activation(self, kind: ActivationKind, x: str) -> str:
        g = self.g

        def real(value: float) -> str:
            return g.real(np.float32(value))

        match kind:
            case "silu":
                return g.node("Mul", [x, g.node("Sigmoid", [x])])
            case "quick_gelu":
                return g.node("Mul", [x, g.node("Sigmoid", [g.node("Mul", [x, real(1.702)])])])
            case "gelu":  # x / 2 * (1 + erf(x / sqrt(2)))
                bent = g.node("Erf", [g.node("Mul", [x, real(math.sqrt(0.5))])])
            case "gelu_tanh":  # x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
                cube = g.node("Mul", [g.node("Mul", [x, x]), x])
                inner = g.node("Add", [x, g.node("Mul", [cube, real(0.044715)])])
                bent = g.node("Tanh", [g.node("Mul", [inner, real(math.sqrt(2 / math.pi))])])
        return g.node("Mul", [g.node("Mul", [x, real(0.5)]), g.node("Add", [bent, real(1.0)])])

    def attention(self, x: str, place: str, block: int) -> str:
        g, spec, heads, head = self.g, self.spec, self.spec.heads, self.spec.head_dim
        qkv = g.node("Reshape", [self.w.joint_projections(x, place), g.constant([self._patches, 3 * heads, head])])
        qkv = g.node("Transpose", [qkv], perm=[1, 0, 2])
        turned, value = g.nodes("Split", [qkv, g.constant([2 * heads, heads])], [True] * 2, axis=0)
        turned = self._rotate(g.widen(turned))
        query, key = g.nodes("Split", [turned, g.constant([heads, heads])], [True] * 2, axis=0)
        query, key = g.narrow(g.node("Mul", [query, self._scale])), g.narrow(key)
        if not spec.windowed(block):
            out = self._attend(query, key, value, axes=3, bias=self._frame_bias)
        elif isinstance(self._coverage, FixedGrid):
            out = self._within_runs(query, key, value)
        else:
            out = self._within_padded(query, key, value, self._coverage.sizes["windows"])
        return g.node("Reshape", [g.node("Transpose", [out], perm=[1, 0, 2]), self.rows])

    def _rotate(self, x: str) -> str:
        """Rotary position embedding of float32 [heads, patches, head_dim], the two halves of a head as the pair."""
        g, half = self.g, self.spec.head_dim // 2
        first, second = g.nodes("Split", [x, g.constant([half, half])], [True] * 2, axis=2)
        swapped = g.node("Concat", [second, first], axis=2)
        return g.node("Add", [g.node("Mul", [x, self._cos]), g.node("Mul", [swapped, self._sin])])

    def _attend(self, query: str, key: str, value: str, *, axes: int, bias: str) -> str:
        """softmax(query key^T + bias) value over the last two of `axes` axes; the query comes scaled."""
        g, (*leading, rows, width) = self.g, range(axes)
        scores = g.widen(g.node("MatMul", [query, g.node("Transpose", [key], perm=[*leading, width, rows])]))
        if bias:
            scores = g.node("Add", [scores, bias])
        return g.node("MatMul", [g.narrow(g.node("Softmax", [scores], axis=-1)), value])

    def _within_runs(self, query: str, key: str, value: str) -> str:
        """Attention of [heads, patches, head_dim] within windows, those of one size as a batch."""
        g, heads, width = self.g, self.spec.heads, self.spec.head_dim
        if len(self._groups) == 1:
            parts = [[query], [key], [value]]
        else:
            rows, wanted = g.constant([size * windows for size, windows in self._groups]), [True] * len(self._groups)
            parts = [g.nodes("Split", [x, rows], wanted, axis=1) for x in (query, key, value)]
        found = []
        for (size, windows), *run in zip(self._groups, *parts, strict=True):
            batch = [g.node("Reshape", [x, g.constant([heads, windows, size, width])]) for x in run]
            out = self._attend(*batch, axes=4, bias="")
            found.append(g.node("Reshape", [out, g.constant([heads, windows * size, width])]))
        return found[0] if len(found) == 1 else g.node("Concat", found, axis=1)

    def _within_padded(self, query: str, key: str, value: str, windows: int) -> str:
        """Attention of [heads, patches, head_dim] within windows that are padded to full size."""
        g, heads, size, width = self.g, self.spec.heads, self.spec.window_patches, self.spec.head_dim
        shape = g.constant([heads, windows, size, width])
        gathered = [g.node("Gather", [x, self._window_rows], axis=1) for x in (query, key, value)]
        batch = [g.node("Reshape", [x, shape]) for x in gathered]
        out = self._attend(*batch, axes=4, bias="window_bias")
        out = g.node("Reshape", [out, g.constant([heads, windows * size, width])])
        return g.node("Gather", [out, "window_slots"], axis=1)


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
