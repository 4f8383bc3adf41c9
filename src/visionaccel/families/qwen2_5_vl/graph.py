"""The Qwen2.5-VL vision tower as one ONNX graph for every grid: the grid-dependent tables are inputs.

Rows are patches in window order from the embedding to the merger. Window attention gathers the rows into windows padded
to full size, with a key mask; full attention takes the frames of a call as a batch, so all frames of one call must have
the same height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from visionaccel.checkpoint import StoredTensor
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.families.qwen2_5_vl.signature import EMBEDDINGS, PIXELS, signature
from visionaccel.families.qwen2_5_vl.weights import TowerWeights
from visionaccel.onnx_writer import MICROSOFT, GraphWriter
from visionaccel.program import AnyGrid

__all__ = ["write_graph"]

OPSET = 17
NORM_EPSILON = 1e-6


def write_graph(config: VisionConfig, weights: Mapping[str, StoredTensor], writer: GraphWriter) -> onnx.ModelProto:
    """Write the tower.

    Args:
        config: Sizes of the tower.
        weights: The tower's tensors by their names below the prefix, such as `blocks.0.norm1.weight`.
        writer: An empty writer.

    Raises:
        CheckpointError: If a weight is missing, or has another shape or dtype than the configuration demands.
    """
    return _Tower(config, weights, writer).write()


class _Tower:
    """State of one writing: the configuration, the weights, and values that every block shares."""

    def __init__(self, config: VisionConfig, weights: Mapping[str, StoredTensor], writer: GraphWriter) -> None:
        self.config, self.w, self.g = config, TowerWeights(config, weights, writer), writer

    def write(self) -> onnx.ModelProto:
        config, g = self.config, self.g
        hidden, merged = config.hidden_size, config.merged_patches
        self.rows = g.constant([-1, hidden])
        self.windows = g.constant([-1, config.window_patches, hidden])
        self.one_sequence = g.constant([1, -1, hidden])
        self.frame_batch = g.node("Concat", ["frames", g.constant([-1, hidden])], axis=0)
        self.window_rows = g.node("Reshape", ["window_patches", g.constant([-1])])
        patches = g.node("Slice", [g.node("Shape", [PIXELS]), *(g.constant([n]) for n in (0, 1, 0))])
        positions = g.node("Range", [g.constant(np.int64(0)), g.node("Squeeze", [patches]), g.constant(np.int64(1))])
        self.positions = g.node("Unsqueeze", [positions, g.constant([0])])

        self.rotary = [g.narrow("rotary_cos"), g.narrow("rotary_sin")]
        x = self.w.embed(g.narrow(PIXELS))
        x = g.node("Reshape", [x, g.constant([-1, merged, hidden])])
        x = g.node("Reshape", [g.node("Gather", [x, "window_index"], axis=0), self.rows])

        update = None
        for block in range(config.depth):
            x, normed = self.add_norm(x, update, f"blocks.{block}.norm1.weight")
            attended = self.attention(normed, f"blocks.{block}.attn", full=block in config.fullatt_block_indexes)
            x, normed = self.add_norm(x, attended, f"blocks.{block}.norm2.weight")
            update = self.mlp(normed, f"blocks.{block}.mlp")

        _, x = self.add_norm(x, update, "merger.ln_q.weight")
        x = g.node("Reshape", [x, g.constant([-1, hidden * merged])])
        x = self.w.linear(x, "merger.mlp.0", hidden * merged, hidden * merged)
        x = g.node("Gelu", [x], domain=MICROSOFT)
        x = self.w.linear(x, "merger.mlp.2", config.out_hidden_size, hidden * merged)
        g.rename(g.widen(g.node("Gather", [x, "reverse_index"], axis=0)), EMBEDDINGS)
        inputs, outputs = signature(config, AnyGrid(), None)
        return g.model("qwen2_5_vl_vision_tower", inputs, outputs, opset=OPSET, microsoft=True)

    def add_norm(self, x: str, update: str | None, name: str) -> tuple[str, str]:
        """X + update and its RMS normalisation; two outputs of one fused node where there is an update."""
        scale = self.w.norm(name)
        if update is None:
            return x, self.norm(x, scale)
        normed, total = self.g.nodes(
            "SkipSimplifiedLayerNormalization",
            [x, update, scale],
            [True, False, False, True],
            domain=MICROSOFT,
            epsilon=NORM_EPSILON,
        )
        return total, normed

    def norm(self, x: str, scale: str) -> str:
        """RMS normalisation in standard operators: before opset 23 there is none for it, and runtimes fuse these."""
        g = self.g
        mean = g.node("ReduceMean", [g.node("Mul", [x, x])], axes=[-1], keepdims=1)
        root = g.node("Sqrt", [g.node("Add", [mean, g.real(np.float32(NORM_EPSILON))])])
        return g.node("Mul", [g.node("Div", [x, root]), scale])

    def attention(self, x: str, name: str, *, full: bool) -> str:
        """Self-attention within each frame (`full`) or within each window."""
        g, hidden, heads = self.g, self.config.hidden_size, self.config.num_heads
        qkv = self.w.linear(x, f"{name}.qkv", 3 * hidden, hidden)
        query, key, value = g.nodes("Split", [qkv, g.constant([hidden] * 3)], [True] * 3, axis=1)
        query, key = self.rotate(query), self.rotate(key)
        if full:
            batch = [g.node("Reshape", [part, self.frame_batch]) for part in (query, key, value)]
        else:
            gathered = [g.node("Gather", [part, self.window_rows], axis=0) for part in (query, key, value)]
            batch = [g.node("Reshape", [part, self.windows]) for part in gathered] + ["", "window_mask"]
        scale = self.config.head_dim**-0.5
        out = g.node("MultiHeadAttention", batch, domain=MICROSOFT, num_heads=heads, scale=scale)
        out = g.node("Reshape", [out, self.rows])
        if not full:
            out = g.node("Gather", [out, "window_slots"], axis=0)
        return self.w.linear(out, f"{name}.proj", hidden, hidden)

    def rotate(self, x: str) -> str:
        """Rotary position embedding of [patches, hidden], the two halves of each head as the pair."""
        tables = [self.positions, *self.rotary]
        x = self.g.node("Reshape", [x, self.one_sequence])
        x = self.g.node(
            "RotaryEmbedding", [x, *tables], domain=MICROSOFT, num_heads=self.config.num_heads, interleaved=0
        )
        return self.g.node("Reshape", [x, self.rows])

    def mlp(self, x: str, name: str) -> str:
        """The gated feed-forward network: down(silu(gate(x)) * up(x))."""
        g, hidden, inner = self.g, self.config.hidden_size, self.config.intermediate_size
        gate = self.w.linear(x, f"{name}.gate_proj", inner, hidden)
        # QuickGelu with alpha 1 is x * sigmoid(x), that is SiLU, in one node.
        gate = g.node("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)
        product = g.node("Mul", [gate, self.w.linear(x, f"{name}.up_proj", inner, hidden)])
        return self.w.linear(product, f"{name}.down_proj", hidden, inner)
