"""The operators of a graph for every grid, in the words of two dialects of ONNX.

ONNX Runtime has kernels of its own for norms, rotary positions and attention (`com.microsoft`), which are faster than
what it makes of the standard's. Other runtimes know the standard's operators alone, which has them since opset 23.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from onnx import TensorProto

from visionaccel.core.program import OperatorDialect
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.towers.onnx.writer import MICROSOFT, GraphWriter

__all__ = ["DIALECTS", "Operators"]

NORM_EPSILON = 1e-6


class Operators(ABC):
    """Writes the nodes that differ between the dialects. Values are [patches, hidden] unless said otherwise.

    Args:
        config: Sizes of the tower.
        writer: The graph.

    Attributes:
        opset: Version of the standard operators.
        microsoft: Whether `com.microsoft` operators are used.
    """

    opset: ClassVar[int]
    microsoft: ClassVar[bool]

    def __init__(self, config: VisionConfig, writer: GraphWriter) -> None:
        self.config, self.g = config, writer
        self.rows = writer.constant([-1, config.hidden_size])
        self.one_sequence = writer.constant([1, -1, config.hidden_size])
        self.scale = config.head_dim**-0.5

    @abstractmethod
    def prepare(self) -> None:
        """Write what every block shares; called once, before any other."""

    @abstractmethod
    def norm(self, x: str, scale: str) -> str:
        """RMS normalisation over the last axis."""

    @abstractmethod
    def add_norm(self, x: str, update: str, scale: str) -> tuple[str, str]:
        """X + update, and its RMS normalisation."""

    @abstractmethod
    def rotate(self, x: str) -> str:
        """Rotary position embedding, the two halves of each head as the pair."""

    @abstractmethod
    def attend(self, query: str, key: str, value: str, *, masked: bool) -> str:
        """Attention of [batch, rows, hidden], of the keys that `window_mask` leaves if `masked`."""

    @abstractmethod
    def silu(self, x: str) -> str:
        """X * sigmoid(x)."""

    @abstractmethod
    def gelu(self, x: str) -> str:
        """The exact GELU."""


class MicrosoftOperators(Operators):
    """ONNX Runtime's fused operators."""

    opset = 17
    microsoft = True

    def prepare(self) -> None:
        g = self.g
        shape = g.node("Shape", ["rotary_cos"])
        patches = g.node("Slice", [shape, *(g.constant([n]) for n in (0, 1, 0))])
        positions = g.node("Range", [g.constant(np.int64(0)), g.node("Squeeze", [patches]), g.constant(np.int64(1))])
        self.positions = g.node("Unsqueeze", [positions, g.constant([0])])
        self.rotary = [g.narrow("rotary_cos"), g.narrow("rotary_sin")]

    def norm(self, x: str, scale: str) -> str:
        # Written out: before opset 23 the standard has no operator for it, and ONNX Runtime fuses these.
        g = self.g
        mean = g.node("ReduceMean", [g.node("Mul", [x, x])], axes=[-1], keepdims=1)
        root = g.node("Sqrt", [g.node("Add", [mean, g.real(np.float32(NORM_EPSILON))])])
        return g.node("Mul", [g.node("Div", [x, root]), scale])

    def add_norm(self, x: str, update: str, scale: str) -> tuple[str, str]:
        normed, total = self.g.nodes(
            "SkipSimplifiedLayerNormalization",
            [x, update, scale],
            [True, False, False, True],
            domain=MICROSOFT,
            epsilon=NORM_EPSILON,
        )
        return total, normed

    def rotate(self, x: str) -> str:
        g, heads = self.g, self.config.num_heads
        x = g.node("Reshape", [x, self.one_sequence])
        tables = [self.positions, *self.rotary]
        x = g.node("RotaryEmbedding", [x, *tables], domain=MICROSOFT, num_heads=heads, interleaved=0)
        return g.node("Reshape", [x, self.rows])

    def attend(self, query: str, key: str, value: str, *, masked: bool) -> str:
        batch = [query, key, value, *(["", "window_mask"] if masked else [])]
        heads = self.config.num_heads
        return self.g.node("MultiHeadAttention", batch, domain=MICROSOFT, num_heads=heads, scale=self.scale)

    def silu(self, x: str) -> str:
        # QuickGelu with alpha 1 is x * sigmoid(x) in one node.
        return self.g.node("QuickGelu", [x], domain=MICROSOFT, alpha=1.0)

    def gelu(self, x: str) -> str:
        return self.g.node("Gelu", [x], domain=MICROSOFT)


class StandardOperators(Operators):
    """The standard's operators of opset 23."""

    opset = 23
    microsoft = False

    def prepare(self) -> None:
        g, half = self.g, self.config.head_dim // 2
        one = g.constant([1, -1, half])
        self.rotary = [g.node("Reshape", [g.narrow(name), one]) for name in ("rotary_cos", "rotary_sin")]
        kept = g.node("Cast", ["window_mask"], to=TensorProto.BOOL)
        # [windows, heads, queries, keys], the same for every head and query. Written out for the queries: the standard
        # lets it be broadcast, and ONNX Runtime's CPU does so over the heads only.
        keys = g.node("Unsqueeze", [kept, g.constant([1, 2])])
        self.mask = g.node("Expand", [keys, g.constant([1, 1, self.config.window_patches, 1])])

    def norm(self, x: str, scale: str) -> str:
        return self.g.node("RMSNormalization", [x, scale], axis=-1, epsilon=NORM_EPSILON)

    def add_norm(self, x: str, update: str, scale: str) -> tuple[str, str]:
        total = self.g.node("Add", [x, update])
        return total, self.norm(total, scale)

    def rotate(self, x: str) -> str:
        g = self.g
        x = g.node("Reshape", [x, self.one_sequence])
        x = g.node("RotaryEmbedding", [x, *self.rotary], num_heads=self.config.num_heads)
        return g.node("Reshape", [x, self.rows])

    def attend(self, query: str, key: str, value: str, *, masked: bool) -> str:
        batch = [query, key, value, *([self.mask] if masked else [])]
        heads = self.config.num_heads
        return self.g.node("Attention", batch, q_num_heads=heads, kv_num_heads=heads, scale=self.scale)

    def silu(self, x: str) -> str:
        return self.g.node("Mul", [x, self.g.node("Sigmoid", [x])])

    def gelu(self, x: str) -> str:
        return self.g.node("Gelu", [x])


DIALECTS: Mapping[OperatorDialect, type[Operators]] = MappingProxyType(
    {"microsoft": MicrosoftOperators, "standard": StandardOperators}
)
"""The operators by the name of the dialect."""
