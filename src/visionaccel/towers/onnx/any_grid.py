"""Graphs for any grid: tables are inputs, attention is one operator, and the frames of a call are a batch.

Therefore all frames of one call must have the same height and width. ONNX Runtime has its own kernels for norms, rotary
positions and attention (`com.microsoft`), which are faster than its standard operators. Other runtimes only have the
standard operators, which include rotary positions and attention since opset 23.

A program of fixed shapes in ONNX Runtime's operators is the same graph with values bound to its inputs. Its fused
attention computes the scores piece by piece, while standard operators keep all of them in memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from visionaccel.core.program import PIXELS, AnyGrid, Bucket, Coverage, FixedGrid
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import ActivationKind, Norm, TowerSpec
from visionaccel.towers.onnx.graph import TowerGraph
from visionaccel.towers.onnx.writer import MICROSOFT, GraphWriter
from visionaccel.towers.tables import make_tables, signature


class AnyGridGraph(TowerGraph):
    """Attention over frames as a batch, or over rows gathered into windows that are padded to full size."""

    def __init__(
        self, spec: TowerSpec, weights: Mapping[str, StoredTensor], writer: GraphWriter, coverage: Coverage
    ) -> None:
        super().__init__(spec, weights, writer)
        g = writer
        if not isinstance(coverage, AnyGrid):
            self.pads = _bind_tables(spec, g, coverage)
        self.scale = spec.head_dim**-0.5
        self._one_sequence = g.constant([1, -1, spec.hidden])
        self._frame_batch = g.node("Concat", ["frames", g.constant([-1, spec.hidden])], axis=0)
        if spec.window is not None:
            self.order_index, self.reverse_index = "window_index", "reverse_index"
            self._window_rows = g.node("Reshape", ["window_patches", g.constant([-1])])
            self._windows = g.constant([-1, spec.window_patches, spec.hidden])
            self._mask = self.mask("window_mask")
        self.rotary = self.rotary_inputs(*(g.narrow(name) for name in ("rotary_cos", "rotary_sin")))

    def attention(self, x: str, place: str, block: int) -> str:
        g, windowed = self.g, self.spec.windowed(block)
        parts = self.projections(x, place)
        query, key, value = parts if len(parts) == 3 else g.split(parts[0], [self.spec.hidden] * 3, axis=1)
        parts, shape = [self._rotated(query), self._rotated(key), value], self._frame_batch
        if windowed:
            parts, shape = [g.node("Gather", [part, self._window_rows], axis=0) for part in parts], self._windows
        batch = [g.node("Reshape", [part, shape]) for part in parts]
        out = g.node("Reshape", [self.attend(batch, self._mask if windowed else ""), self.rows])
        return g.node("Gather", [out, "window_slots"], axis=0) if windowed else out

    def _rotated(self, x: str) -> str:
        x = self.g.node("Reshape", [x, self._one_sequence])
        return self.g.node("Reshape", [self.rotate(x), self.rows])

    @abstractmethod
    def mask(self, mask: str) -> str:
        """Make the attention mask that hides the padding of windows, from the table [windows, keys]."""

    @abstractmethod
    def rotary_inputs(self, cos: str, sin: str) -> list[str]:
        """Make the inputs that all rotations share, from tables [patches, head_dim / 2]."""

    @abstractmethod
    def rotate(self, x: str) -> str:
        """Apply the rotary position embedding to [1, patches, hidden]; the two halves of each head are the pairs."""

    @abstractmethod
    def attend(self, batch: list[str], mask: str) -> str:
        """Attend with queries, keys and values [batch, rows, hidden]; an empty `mask` means no mask."""


class MicrosoftGraph(AnyGridGraph):
    """A graph that uses ONNX Runtime's fused operators."""

    opset = 17

    def rotary_inputs(self, cos: str, sin: str) -> list[str]:
        g = self.g
        patches = g.node("Slice", [g.node("Shape", ["rotary_cos"]), *(g.constant([n]) for n in (0, 1, 0))])
        positions = g.node("Range", [g.constant(np.int64(0)), g.node("Squeeze", [patches]), g.constant(np.int64(1))])
        return [g.node("Unsqueeze", [positions, g.constant([0])]), cos, sin]

    def mask(self, mask: str) -> str:
        return mask

    def norm(self, norm: Norm, place: str, x: str) -> str:
        g, weights = self.g, self.norm_weights(norm, place)
        if norm.kind == "layer":
            return g.node("LayerNormalization", [x, *weights], axis=-1, epsilon=norm.epsilon)
        # Written out: before opset 23 there is no standard operator for it, and ONNX Runtime fuses these nodes.
        mean = g.node("ReduceMean", [g.node("Mul", [x, x])], axes=[-1], keepdims=1)
        root = g.node("Sqrt", [g.node("Add", [mean, g.real(norm.epsilon)])])
        return g.node("Mul", [g.node("Div", [x, root]), *weights])

    def add_norm(self, norm: Norm, place: str, x: str, update: str) -> tuple[str, str]:
        if not update:
            return super().add_norm(norm, place, x, update)
        kind = "SkipLayerNormalization" if norm.kind == "layer" else "SkipSimplifiedLayerNormalization"
        inputs, wanted = [x, update, *self.norm_weights(norm, place)], [True, False, False, True]
        normed, total = self.g.nodes(kind, inputs, wanted, domain=MICROSOFT, epsilon=norm.epsilon)
        return total, normed

    def activation(self, kind: ActivationKind, x: str) -> str:
        match kind:
            case "gelu":
                return self.g.node("Gelu", [x], domain=MICROSOFT)
            case "gelu_tanh":
                return self.g.node("FastGelu", [x], domain=MICROSOFT)
            case "silu" | "quick_gelu":  # x * sigmoid(alpha * x) in one node
                return self.g.node("QuickGelu", [x], domain=MICROSOFT, alpha=1.0 if kind == "silu" else 1.702)

    def rotate(self, x: str) -> str:
        heads = self.spec.heads
        return self.g.node("RotaryEmbedding", [x, *self.rotary], domain=MICROSOFT, num_heads=heads, interleaved=0)

    def attend(self, batch: list[str], mask: str) -> str:
        inputs = [*batch, *(["", mask] if mask else [])]
        heads = self.spec.heads
        return self.g.node("MultiHeadAttention", inputs, domain=MICROSOFT, num_heads=heads, scale=self.scale)


class StandardGraph(AnyGridGraph):
    """Uses standard operators of opset 23."""

    opset = 23

    def rotary_inputs(self, cos: str, sin: str) -> list[str]:
        one = self.g.constant([1, -1, self.spec.head_dim // 2])
        return [self.g.node("Reshape", [table, one]) for table in (cos, sin)]

    def mask(self, mask: str) -> str:
        g = self.g
        kept = g.node("Cast", [mask], to=TensorProto.BOOL)
        # [windows, heads, queries, keys], the same for every head and query. Expanded for the queries: the standard
        # allows broadcasting them, but ONNX Runtime on the CPU broadcasts only the heads.
        keys = g.node("Unsqueeze", [kept, g.constant([1, 2])])
        return g.node("Expand", [keys, g.constant([1, 1, self.spec.window_patches, 1])])

    def norm(self, norm: Norm, place: str, x: str) -> str:
        operator = "LayerNormalization" if norm.kind == "layer" else "RMSNormalization"
        return self.g.node(operator, [x, *self.norm_weights(norm, place)], axis=-1, epsilon=norm.epsilon)

    def activation(self, kind: ActivationKind, x: str) -> str:
        g = self.g
        if kind in ("gelu", "gelu_tanh"):
            return g.node("Gelu", [x], approximate="tanh" if kind == "gelu_tanh" else "none")
        scaled = x if kind == "silu" else g.node("Mul", [x, g.real(1.702)])
        return g.node("Mul", [x, g.node("Sigmoid", [scaled])])

    def rotate(self, x: str) -> str:
        return self.g.node("RotaryEmbedding", [x, *self.rotary], num_heads=self.spec.heads)

    def attend(self, batch: list[str], mask: str) -> str:
        inputs, heads = [*batch, *([mask] if mask else [])], self.spec.heads
        return self.g.node("Attention", inputs, q_num_heads=heads, kv_num_heads=heads, scale=self.scale)


def _bind_tables(spec: TowerSpec, g: GraphWriter, coverage: FixedGrid | Bucket) -> str:
    """Bind the inputs of a graph for any grid to fixed shapes; return the padding of the embeddings, empty for none.

    A fixed grid has constant tables. A bucket's padded inputs are cut to the real rows.
    """
    if isinstance(coverage, FixedGrid):
        inputs, tables = signature(spec, AnyGrid(), None)[0], make_tables(spec, [coverage.grid])
        constants = {each.name: g.constant(tables[each.name]) for each in inputs if each.name in tables}
        g.bound = {**constants, "frames": g.constant([1])}
        return ""
    zero, one = g.constant([0]), g.constant([1])
    hidden = g.constant(np.float32(-1.0))  # the host adds 0 to the scores of real keys, a large negative to others
    patches = _count(g, g.node("Greater", ["frame_bias", hidden]))
    tokens = g.node("Div", [patches, g.constant([spec.merged])])

    def cut(value: str, rows: str, axis: str = zero) -> str:
        return g.node("Slice", [value, zero, rows, axis])

    bound = {name: cut(name, patches) for name in (PIXELS, "rotary_cos", "rotary_sin")}
    if spec.positions is not None:
        bound |= {name: cut(name, patches, one) for name in ("position_index", "position_weight")}
    if spec.window is not None:
        kept = g.node("Squeeze", [g.node("Greater", ["window_bias", hidden]), one])
        # A window's real patches come first, so a window without any is padding.
        windows = _count(g, g.node("Squeeze", [g.node("Slice", [kept, zero, one, one]), one]))
        bound |= {name: cut(name, tokens) for name in ("window_index", "reverse_index")}
        bound["window_slots"] = cut("window_slots", patches)
        bound["window_patches"] = cut("window_patches", windows)
        bound["window_mask"] = cut(g.node("Cast", [kept], to=TensorProto.INT32), windows)
    missing = g.node("Sub", [g.constant([coverage.patches // spec.merged]), tokens])
    g.bound = {**bound, "frames": one}
    return g.node("Concat", [g.constant([0, 0]), missing, zero], axis=0)


def _count(g: GraphWriter, flags: str) -> str:
    """Count the set flags of a vector, as int64 [1]."""
    numbers = g.node("Cast", [flags], to=TensorProto.INT64)
    return g.node("ReduceSum", [numbers, g.constant([0])], keepdims=1)
