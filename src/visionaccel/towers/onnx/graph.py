"""The Qwen2.5-VL vision tower as one ONNX graph for every grid: the grid-dependent tables are inputs.

Rows are patches in window order from the embedding to the merger. Window attention gathers the rows into windows padded
to full size, with a key mask; full attention takes the frames of a call as a batch, so all frames of one call must have
the same height and width. Norms, rotary positions and attention come in the operators of one of two dialects
(`dialects`).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from visionaccel.core.program import AnyGrid, OperatorDialect
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.families.qwen2_5_vl.weights import TowerWeights
from visionaccel.towers.onnx.operators import DIALECTS
from visionaccel.towers.onnx.writer import GraphWriter
from visionaccel.towers.signature import EMBEDDINGS, PIXELS, signature

__all__ = ["write_graph"]


def write_graph(
    config: VisionConfig, weights: Mapping[str, StoredTensor], writer: GraphWriter, dialect: OperatorDialect
) -> onnx.ModelProto:
    """Write the tower.

    Args:
        config: Sizes of the tower.
        weights: The tower's tensors by their names below the prefix, such as `blocks.0.norm1.weight`.
        writer: An empty writer.
        dialect: Whose operators to write.

    Raises:
        CheckpointError: If a weight is missing, or has another shape or dtype than the configuration demands.
    """
    return _Tower(config, weights, writer, dialect).write()


class _Tower:
    """State of one writing: the configuration, the weights, and values that every block shares."""

    def __init__(
        self,
        config: VisionConfig,
        weights: Mapping[str, StoredTensor],
        writer: GraphWriter,
        dialect: OperatorDialect,
    ) -> None:
        self.config, self.w, self.g = config, TowerWeights(config, weights, writer), writer
        self.rows = writer.constant([-1, config.hidden_size])
        self.windows = writer.constant([-1, config.window_patches, config.hidden_size])
        self.operators = DIALECTS[dialect](config, writer)

    def write(self) -> onnx.ModelProto:
        config, g = self.config, self.g
        hidden, merged = config.hidden_size, config.merged_patches
        self.frame_batch = g.node("Concat", ["frames", g.constant([-1, hidden])], axis=0)
        self.window_rows = g.node("Reshape", ["window_patches", g.constant([-1])])
        self.operators.prepare()

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
        x = self.operators.gelu(x)
        x = self.w.linear(x, "merger.mlp.2", config.out_hidden_size, hidden * merged)
        g.rename(g.widen(g.node("Gather", [x, "reverse_index"], axis=0)), EMBEDDINGS)
        inputs, outputs = signature(config, AnyGrid(), None)
        operators = self.operators
        return g.model("qwen2_5_vl_vision_tower", inputs, outputs, opset=operators.opset, microsoft=operators.microsoft)

    def add_norm(self, x: str, update: str | None, name: str) -> tuple[str, str]:
        """X + update, and its RMS normalisation."""
        scale = self.w.norm(name)
        return (x, self.operators.norm(x, scale)) if update is None else self.operators.add_norm(x, update, scale)

    def attention(self, x: str, name: str, *, full: bool) -> str:
        """Self-attention within each frame (`full`) or within each window."""
        g, hidden = self.g, self.config.hidden_size
        query, key, value = self.w.projections(x, name)
        query, key = self.operators.rotate(query), self.operators.rotate(key)
        if full:
            batch = [g.node("Reshape", [part, self.frame_batch]) for part in (query, key, value)]
        else:
            gathered = [g.node("Gather", [part, self.window_rows], axis=0) for part in (query, key, value)]
            batch = [g.node("Reshape", [part, self.windows]) for part in gathered]
        out = g.node("Reshape", [self.operators.attend(*batch, masked=not full), self.rows])
        if not full:
            out = g.node("Gather", [out, "window_slots"], axis=0)
        return self.w.linear(out, f"{name}.proj", hidden, hidden)

    def mlp(self, x: str, name: str) -> str:
        """The gated feed-forward network: down(silu(gate(x)) * up(x))."""
        g, hidden, inner = self.g, self.config.hidden_size, self.config.intermediate_size
        gate = self.operators.silu(self.w.linear(x, f"{name}.gate_proj", inner, hidden))
        product = g.node("Mul", [gate, self.w.linear(x, f"{name}.up_proj", inner, hidden)])
        return self.w.linear(product, f"{name}.down_proj", hidden, inner)
