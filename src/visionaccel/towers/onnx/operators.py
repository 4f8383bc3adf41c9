"""The operators that differ between dialects of ONNX, and those of a graph for any grid.

ONNX Runtime has its own kernels for norms, rotary positions and attention (`com.microsoft`), which are faster than
what it makes of the standard's. Other runtimes know the standard's operators alone, which has them since opset 23.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from onnx import TensorProto

from visionaccel.core.tower_spec import ActivationKind, Norm, TowerSpec
from visionaccel.towers.onnx.writer import MICROSOFT, GraphWeights, GraphWriter


class Operators(ABC):
    """Writes the nodes that differ. Values are [patches, hidden] unless said otherwise.

    Args:
        spec: The tower.
        writer: The graph.
        weights: Its weights.
        patches: Rows of the graph; None for any number.

    Attributes:
        opset: Version of the standard operators.
        microsoft: Whether `com.microsoft` operators are used.
        order_index: int64 [tokens]; where each token of the graph's own order stands in the order at its edge; empty
            where these are the same.
        reverse_index: int64 [tokens]; its inverse.
    """

    opset: ClassVar[int]
    microsoft: ClassVar[bool]

    def __init__(self, spec: TowerSpec, writer: GraphWriter, weights: GraphWeights, patches: int | None) -> None:
        self.spec, self.g, self.w = spec, writer, weights
        self.order_index, self.reverse_index = "", ""
        tokens = -1 if patches is None else patches // spec.merged
        self.rows = writer.constant([-1 if patches is None else patches, spec.hidden])
        self._tokens = writer.constant([tokens, spec.merged * spec.hidden])

    def table(self, name: str) -> str:
        """The value of a table, by the name of the input that it is in the graph for any grid."""
        return name

    def ordered(self, x: str, *, split: bool) -> str:
        """Rows in the graph's own order, from the order at its edge; [tokens, merged, hidden] comes in if split."""
        if self.order_index:
            x = self.g.node("Gather", [x if split else self.tokens(x), self.order_index], axis=0)
        return self.g.node("Reshape", [x, self.rows]) if split or self.order_index else x

    def tokens(self, x: str) -> str:
        """Rows with those of a token side by side: [tokens, merged * hidden]."""
        return self.g.node("Reshape", [x, self._tokens])

    @abstractmethod
    def prepare(self) -> None:
        """Write what every block shares; called once, before any other."""

    @abstractmethod
    def norm(self, norm: Norm, x: str, scale: str, bias: str) -> str:
        """A normalisation over the last axis."""

    def add_norm(self, norm: Norm, x: str, update: str, scale: str, bias: str) -> tuple[str, str]:
        """X + update, and its normalisation."""
        total = self.g.node("Add", [x, update])
        return total, self.norm(norm, total, scale, bias)

    @abstractmethod
    def activation(self, kind: ActivationKind, x: str) -> str:
        """A function of each element."""

    @abstractmethod
    def attention(self, x: str, place: str, block: int) -> str:
        """A block's attention, from its normalised rows to what its last projection takes."""


class FusedOperators(Operators):
    """Attention as one operator: over frames as a batch, or over rows gathered into windows padded to full size.

    Args:
        spec: The tower.
        writer: The graph.
        weights: Its weights.
        bound: Values that stand for inputs of the graph for any grid.
    """

    def __init__(
        self, spec: TowerSpec, writer: GraphWriter, weights: GraphWeights, bound: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(spec, writer, weights, None)
        self._bound = bound or {}
        self.one_sequence = writer.constant([1, -1, spec.hidden])
        self.scale = spec.head_dim**-0.5
        if spec.window is not None:
            self.order_index, self.reverse_index = self.table("window_index"), self.table("reverse_index")

    def table(self, name: str) -> str:
        return self._bound.get(name, name)

    def prepare(self) -> None:
        g, spec = self.g, self.spec
        self.frame_batch = g.node("Concat", [self.table("frames"), g.constant([-1, spec.hidden])], axis=0)
        if spec.window is not None:
            self.window_rows = g.node("Reshape", [self.table("window_patches"), g.constant([-1])])
            self.windows = g.constant([-1, spec.window_patches, spec.hidden])
            self.mask = self.window_mask(self.table("window_mask"))
        self.prepare_rotary(*(g.narrow(self.table(name)) for name in ("rotary_cos", "rotary_sin")))

    def attention(self, x: str, place: str, block: int) -> str:
        g, windowed = self.g, self.spec.windowed(block)
        query, key, value = self.w.projections(x, place)
        parts, shape = [self.rotated(query), self.rotated(key), value], self.frame_batch
        if windowed:
            parts, shape = [g.node("Gather", [part, self.window_rows], axis=0) for part in parts], self.windows
        batch = [g.node("Reshape", [part, shape]) for part in parts]
        out = g.node("Reshape", [self.attend(batch, self.mask if windowed else ""), self.rows])
        return g.node("Gather", [out, self.table("window_slots")], axis=0) if windowed else out

    def rotated(self, x: str) -> str:
        """Rotary position embedding, the two halves of each head as the pair."""
        x = self.g.node("Reshape", [x, self.one_sequence])
        return self.g.node("Reshape", [self.rotate(x), self.rows])

    @abstractmethod
    def window_mask(self, mask: str) -> str:
        """What hides the padded keys of windows, from 1 for real ones and 0 for padding: int32 [windows, keys]."""

    @abstractmethod
    def prepare_rotary(self, cos: str, sin: str) -> None:
        """Write what every rotation shares, from tables [patches, head_dim / 2]."""

    @abstractmethod
    def rotate(self, x: str) -> str:
        """Rotary position embedding of [1, patches, hidden]."""

    @abstractmethod
    def attend(self, batch: list[str], mask: str) -> str:
        """Attention of queries, keys and values [batch, rows, hidden]; no mask where it is empty."""


class MicrosoftOperators(FusedOperators):
    """ONNX Runtime's fused operators."""

    opset = 17
    microsoft = True

    def prepare_rotary(self, cos: str, sin: str) -> None:
        g = self.g
        shape = g.node("Shape", [self.table("rotary_cos")])
        patches = g.node("Slice", [shape, *(g.constant([n]) for n in (0, 1, 0))])
        positions = g.node("Range", [g.constant(np.int64(0)), g.node("Squeeze", [patches]), g.constant(np.int64(1))])
        self.rotary = [g.node("Unsqueeze", [positions, g.constant([0])]), cos, sin]

    def window_mask(self, mask: str) -> str:
        return mask

    def norm(self, norm: Norm, x: str, scale: str, bias: str) -> str:
        g = self.g
        if norm.kind == "layer":
            return g.node("LayerNormalization", [x, scale, bias], axis=-1, epsilon=norm.epsilon)
        # Written out: before opset 23 the standard has no operator for it, and ONNX Runtime fuses these.
        mean = g.node("ReduceMean", [g.node("Mul", [x, x])], axes=[-1], keepdims=1)
        root = g.node("Sqrt", [g.node("Add", [mean, g.real(np.float32(norm.epsilon))])])
        return g.node("Mul", [g.node("Div", [x, root]), scale])

    def add_norm(self, norm: Norm, x: str, update: str, scale: str, bias: str) -> tuple[str, str]:
        kind = "SkipLayerNormalization" if norm.kind == "layer" else "SkipSimplifiedLayerNormalization"
        inputs, wanted = [x, update, scale, *([bias] if bias else [])], [True, False, False, True]
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


class StandardOperators(FusedOperators):
    """The standard's operators of opset 23."""

    opset = 23
    microsoft = False

    def prepare_rotary(self, cos: str, sin: str) -> None:
        one = self.g.constant([1, -1, self.spec.head_dim // 2])
        self.rotary = [self.g.node("Reshape", [table, one]) for table in (cos, sin)]

    def window_mask(self, mask: str) -> str:
        g = self.g
        kept = g.node("Cast", [mask], to=TensorProto.BOOL)
        # [windows, heads, queries, keys], the same for every head and query. Written out for the queries: the standard
        # lets it be broadcast, and ONNX Runtime's CPU does so over the heads only.
        keys = g.node("Unsqueeze", [kept, g.constant([1, 2])])
        return g.node("Expand", [keys, g.constant([1, 1, self.spec.window_patches, 1])])

    def norm(self, norm: Norm, x: str, scale: str, bias: str) -> str:
        if norm.kind == "layer":
            return self.g.node("LayerNormalization", [x, scale, bias], axis=-1, epsilon=norm.epsilon)
        return self.g.node("RMSNormalization", [x, scale], axis=-1, epsilon=norm.epsilon)

    def activation(self, kind: ActivationKind, x: str) -> str:
        g = self.g
        if kind in ("gelu", "gelu_tanh"):
            return g.node("Gelu", [x], approximate="tanh" if kind == "gelu_tanh" else "none")
        scaled = x if kind == "silu" else g.node("Mul", [x, g.real(np.float32(1.702))])
        return g.node("Mul", [x, g.node("Sigmoid", [scaled])])

    def rotate(self, x: str) -> str:
        return self.g.node("RotaryEmbedding", [x, *self.rotary], num_heads=self.spec.heads)

    def attend(self, batch: list[str], mask: str) -> str:
        inputs, heads = [*batch, *([mask] if mask else [])], self.spec.heads
        return self.g.node("Attention", inputs, q_num_heads=heads, kv_num_heads=heads, scale=self.scale)
