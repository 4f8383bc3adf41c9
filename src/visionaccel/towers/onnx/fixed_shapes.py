"""Graphs of fixed shapes in standard operators of opset 17, for devices that compile ahead of time.

Heads are the leading axis of attention, so that one reshape turns a run of windows into a batch. `FixedGrid` bakes the
tables in and runs the windows of each size as one batch, without a mask. That needs the window order `grouped`; a split
program whose inputs and outputs are in `raster` order gathers into it and back. `Bucket` takes the tables as inputs,
gathers the rows into windows of full size, and adds a mask term to the scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from visionaccel.core.program import Bucket, FixedGrid, HostSplit
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import ActivationKind, Norm, TowerSpec
from visionaccel.towers.host import GROUPED
from visionaccel.towers.onnx.graph import TowerGraph
from visionaccel.towers.onnx.writer import GraphWriter
from visionaccel.towers.tables import make_tables, window_order


class FixedShapesGraph(TowerGraph):
    """Norms, rotary positions and softmax are float32 in every precision, as in the reference."""

    opset = 17

    def __init__(
        self,
        spec: TowerSpec,
        weights: Mapping[str, StoredTensor],
        writer: GraphWriter,
        coverage: FixedGrid | Bucket,
        host: HostSplit | None,
    ) -> None:
        self._patches = coverage.grid.patches if isinstance(coverage, FixedGrid) else coverage.patches
        super().__init__(spec, weights, writer, self._patches)
        self._scale = writer.constant(np.float32(spec.head_dim**-0.5))
        if isinstance(coverage, FixedGrid):
            self._bake(coverage, host)
        else:
            self._take(coverage, host)

    def _bake(self, coverage: FixedGrid, host: HostSplit | None) -> None:
        """Make constant tables of one grid. The graph computes in `grouped` order; inputs and outputs may differ."""
        g, spec = self.g, self.spec
        tables = make_tables(spec, [coverage.grid], grouped=spec.window is not None)
        cos, sin = tables["rotary_cos"], tables["rotary_sin"]
        # The first half of the sines is negated, so that a rotation only swaps halves.
        self._cos, self._sin = (g.constant(np.concatenate(halves, axis=1)) for halves in ([cos, cos], [-sin, sin]))
        self._frame_bias = self._window_bias = ""
        if spec.positions is not None and host is None:
            g.bound = {name: g.constant(tables[name]) for name in ("position_index", "position_weight")}
        if spec.window is None:
            return
        self._runs = [(size, len(list(same))) for size, same in groupby(tables["window_lengths"].tolist())]
        index, reverse = tables["window_index"], tables["reverse_index"]
        if host is not None:
            given = index if host.order == GROUPED else window_order(spec, [coverage.grid])[0]
            index, reverse = np.argsort(given)[index], reverse[given]
        if host is None or not np.array_equal(index, np.arange(len(index))):
            self.order_index, self.reverse_index = g.constant(index), g.constant(reverse)

    def _take(self, bucket: Bucket, host: HostSplit | None) -> None:
        """Use the tables that are inputs, padded to the sizes of a bucket; masks are terms added to the scores."""
        g, spec = self.g, self.spec
        self._cos = g.node("Concat", ["rotary_cos", "rotary_cos"], axis=1)
        self._sin = g.node("Concat", [g.node("Neg", ["rotary_sin"]), "rotary_sin"], axis=1)
        self._frame_bias, self._window_bias = "frame_bias", "window_bias"
        if spec.window is not None:
            windows = bucket.sizes["windows"]
            self._runs = [(spec.window_patches, windows)]
            self._window_rows = g.node("Reshape", ["window_patches", g.constant([windows * spec.window_patches])])
            if host is None:
                self.order_index, self.reverse_index = "window_index", "reverse_index"

    def norm(self, norm: Norm, place: str, x: str) -> str:
        g, weights = self.g, self.norm_weights(norm, place)
        x = g.widen(x)
        if norm.kind == "layer":
            inputs = [x, *(g.widen(value) for value in weights)]
            return g.narrow(g.node("LayerNormalization", inputs, axis=-1, epsilon=norm.epsilon))
        mean = g.node("ReduceMean", [g.node("Pow", [x, g.constant(np.float32(2.0))])], axes=[-1], keepdims=1)
        root = g.node("Sqrt", [g.node("Add", [mean, g.constant(np.float32(norm.epsilon))])])
        return g.node("Mul", [g.narrow(g.node("Div", [x, root])), *weights])

    def activation(self, kind: ActivationKind, x: str) -> str:
        g, real = self.g, self.g.real
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
        joint = g.concat(self.projections(x, place), axis=1)
        qkv = g.node("Reshape", [joint, g.constant([self._patches, 3 * heads, head])])
        turned, value = g.split(g.node("Transpose", [qkv], perm=[1, 0, 2]), [2 * heads, heads], axis=0)
        query, key = g.split(self._rotate(g.widen(turned)), [heads, heads], axis=0)
        query, key = g.narrow(g.node("Mul", [query, self._scale])), g.narrow(key)
        if spec.windowed(block):
            out = self._within_windows([query, key, value])
        else:
            out = self._attend(query, key, value, axes=3, bias=self._frame_bias)
        return g.node("Reshape", [g.node("Transpose", [out], perm=[1, 0, 2]), self.rows])

    def _rotate(self, x: str) -> str:
        """Apply the rotary embedding to float32 [heads, patches, head_dim]; a head's two halves are the pairs."""
        g, half = self.g, self.spec.head_dim // 2
        first, second = g.split(x, [half, half], axis=2)
        swapped = g.concat([second, first], axis=2)
        return g.node("Add", [g.node("Mul", [x, self._cos]), g.node("Mul", [swapped, self._sin])])

    def _attend(self, query: str, key: str, value: str, *, axes: int, bias: str) -> str:
        """Compute softmax(query key^T + bias) value over the last two of `axes` axes; the query is already scaled."""
        g, (*leading, rows, width) = self.g, range(axes)
        scores = g.widen(g.node("MatMul", [query, g.node("Transpose", [key], perm=[*leading, width, rows])]))
        if bias:
            scores = g.node("Add", [scores, bias])
        return g.node("MatMul", [g.narrow(g.node("Softmax", [scores], axis=-1)), value])

    def _within_windows(self, qkv: Sequence[str]) -> str:
        """Attend within windows, over [heads, patches, head_dim]; windows of equal size are one batch."""
        g, heads, width, padded = self.g, self.spec.heads, self.spec.head_dim, bool(self._window_bias)
        if padded:
            qkv = [g.node("Gather", [x, self._window_rows], axis=1) for x in qkv]
        parts = [g.split(x, [size * windows for size, windows in self._runs], axis=1) for x in qkv]
        found = []
        for (size, windows), *run in zip(self._runs, *parts, strict=True):
            batch = [g.node("Reshape", [x, g.constant([heads, windows, size, width])]) for x in run]
            out = self._attend(*batch, axes=4, bias=self._window_bias)
            found.append(g.node("Reshape", [out, g.constant([heads, windows * size, width])]))
        together = g.concat(found, axis=1)
        return g.node("Gather", [together, "window_slots"], axis=1) if padded else together
