"""The Qwen2.5-VL vision tower as an ONNX graph of fixed shapes, for devices that compile ahead of time.

Standard operators of opset 17 only, and no shape that varies. Rows are patches in window order; heads are the leading
axis of attention, so that a run of windows is a reshape away from a batch of them. `FixedGrid` bakes the tables in and
runs the windows of one size as one batch, without any mask. That takes window order `grouped`; a split program with
`raster` order at its edges gathers into it and back. `Bucket` takes the tables as inputs, gathers the rows into windows
of full size, and adds a mask term to the scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx

from visionaccel.core.program import Bucket, FixedGrid, HostSplit
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.families.qwen2_5_vl.static_tables import BakedTables, FedTables, StaticTables, attend
from visionaccel.families.qwen2_5_vl.weights import TowerWeights
from visionaccel.towers.onnx.writer import GraphWriter
from visionaccel.towers.signature import (
    EMBEDDINGS,
    PATCH_EMBEDDINGS,
    PIXELS,
    WINDOW_EMBEDDINGS,
    signature,
)

__all__ = ["write_static_graph"]

OPSET = 17
NORM_EPSILON = 1e-6


def write_static_graph(
    config: VisionConfig,
    weights: Mapping[str, StoredTensor],
    writer: GraphWriter,
    coverage: FixedGrid | Bucket,
    host: HostSplit | None,
) -> onnx.ModelProto:
    """Write the tower with fixed shapes.

    Args:
        config: Sizes of the tower.
        weights: The tower's tensors by their names below the prefix.
        writer: An empty writer; its precision is that of weights and activations. Normalisation, rotary positions and
            softmax are float32 whatever it is, as in the reference.
        coverage: The grid whose tables are baked in, or the sizes that tables are padded to.
        host: What is left to the host; None for the whole tower.

    Raises:
        CheckpointError: If a weight is missing, or has another shape or dtype than the configuration demands.
    """
    tables: StaticTables
    if isinstance(coverage, FixedGrid):
        tables = BakedTables(config, writer, coverage, host)
    else:
        tables = FedTables(config, writer, coverage)
    tower = _StaticTower(config, TowerWeights(config, weights, writer), writer, tables)
    inputs, outputs = signature(config, coverage, host)
    tower.write(host)
    return writer.model("qwen2_5_vl_vision_tower", inputs, outputs, opset=OPSET, microsoft=False)


class _StaticTower:
    """State of one writing."""

    def __init__(self, config: VisionConfig, weights: TowerWeights, writer: GraphWriter, tables: StaticTables) -> None:
        self.config, self.w, self.g, self.tables = config, weights, writer, tables
        self.patches = tables.patches
        self.epsilon = writer.constant(np.float32(NORM_EPSILON))
        self.two = writer.constant(np.float32(2.0))
        self.scale = writer.constant(np.float32(config.head_dim**-0.5))

    def write(self, host: HostSplit | None) -> None:
        config, g = self.config, self.g
        hidden, merged = config.hidden_size, config.merged_patches
        rows = g.constant([self.patches, hidden])
        if host is None:
            x = self.w.embed(g.narrow(PIXELS))
            x = g.node("Reshape", [x, g.constant([self.patches // merged, merged * hidden])])
            x = g.node("Gather", [x, self.tables.window_index], axis=0)
        else:
            x = g.narrow(PATCH_EMBEDDINGS)
            if self.tables.regroup_index is not None:
                x = g.node("Gather", [x, self.tables.regroup_index], axis=0)
        x = g.node("Reshape", [x, rows])
        for block in range(config.depth):
            normed = self.norm(x, self.w.norm(f"blocks.{block}.norm1.weight"))
            full = block in config.fullatt_block_indexes
            x = g.node("Add", [x, self.attention(normed, f"blocks.{block}.attn", full=full)])
            normed = self.norm(x, self.w.norm(f"blocks.{block}.norm2.weight"))
            x = g.node("Add", [x, self.mlp(normed, f"blocks.{block}.mlp")])
        x = self.norm(x, self.w.norm("merger.ln_q.weight"))
        x = g.node("Reshape", [x, g.constant([self.patches // merged, merged * hidden])])
        x = self.gelu(self.w.linear(x, "merger.mlp.0", hidden * merged, hidden * merged))
        x = self.w.linear(x, "merger.mlp.2", config.out_hidden_size, hidden * merged)
        if host is None:
            x = g.node("Gather", [x, self.tables.reverse_index], axis=0)
        elif self.tables.ungroup_index is not None:
            x = g.node("Gather", [x, self.tables.ungroup_index], axis=0)
        g.rename(g.widen(x), WINDOW_EMBEDDINGS if host else EMBEDDINGS)

    def norm(self, x: str, scale: str) -> str:
        """RMS normalisation in float32: x / sqrt(mean(x^2) + epsilon), then the scale."""
        g = self.g
        x = g.widen(x)
        mean = g.node("ReduceMean", [g.node("Pow", [x, self.two])], axes=[-1], keepdims=1)
        root = g.node("Sqrt", [g.node("Add", [mean, self.epsilon])])
        return g.node("Mul", [g.narrow(g.node("Div", [x, root])), scale])

    def attention(self, x: str, name: str, *, full: bool) -> str:
        """Self-attention within the frame (`full`) or within each window, of [patches, hidden]."""
        g, hidden, heads, head = self.g, self.config.hidden_size, self.config.num_heads, self.config.head_dim
        qkv = g.node("Reshape", [self.w.joint_projections(x, name), g.constant([self.patches, 3 * heads, head])])
        qkv = g.node("Transpose", [qkv], perm=[1, 0, 2])
        turned, value = g.nodes("Split", [qkv, g.constant([2 * heads, heads])], [True] * 2, axis=0)
        turned = self.rotate(g.widen(turned))
        query, key = g.nodes("Split", [turned, g.constant([heads, heads])], [True] * 2, axis=0)
        query, key = g.narrow(g.node("Mul", [query, self.scale])), g.narrow(key)
        if full:
            out = attend(g, query, key, value, axes=3, bias=self.tables.frame_bias)
        else:
            out = self.tables.within_windows(query, key, value)
        out = g.node("Transpose", [out], perm=[1, 0, 2])
        out = g.node("Reshape", [out, g.constant([self.patches, hidden])])
        return self.w.linear(out, f"{name}.proj", hidden, hidden)

    def rotate(self, x: str) -> str:
        """Rotary position embedding of float32 [heads, patches, head_dim], the two halves of a head as the pair."""
        g, half = self.g, self.config.head_dim // 2
        first, second = g.nodes("Split", [x, g.constant([half, half])], [True] * 2, axis=2)
        swapped = g.node("Concat", [second, first], axis=2)
        return g.node("Add", [g.node("Mul", [x, self.tables.cos]), g.node("Mul", [swapped, self.tables.sin])])

    def mlp(self, x: str, name: str) -> str:
        """The gated feed-forward network: down(silu(gate(x)) * up(x))."""
        g, hidden, inner = self.g, self.config.hidden_size, self.config.intermediate_size
        gate = self.w.linear(x, f"{name}.gate_proj", inner, hidden)
        gate = g.node("Mul", [gate, g.node("Sigmoid", [gate])])
        product = g.node("Mul", [gate, self.w.linear(x, f"{name}.up_proj", inner, hidden)])
        return self.w.linear(product, f"{name}.down_proj", hidden, inner)

    def gelu(self, x: str) -> str:
        """The exact GELU: x / 2 * (1 + erf(x / sqrt(2)))."""
        g = self.g
        error = g.node("Erf", [g.node("Mul", [x, g.real(np.float32(math.sqrt(0.5)))])])
        halved = g.node("Mul", [x, g.real(np.float32(0.5))])
        return g.node("Mul", [halved, g.node("Add", [error, g.real(np.float32(1.0))])])
