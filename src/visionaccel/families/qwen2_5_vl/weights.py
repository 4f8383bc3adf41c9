"""The tower's weights as a graph writer sees them: by name, with the shape that the configuration demands."""

from __future__ import annotations

from collections.abc import Mapping

from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import CheckpointError
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.towers.onnx.writer import GraphWriter
from visionaccel.towers.signature import PATCH_KERNEL

__all__ = ["TowerWeights"]


class TowerWeights:
    """References to the tower's weights in one graph.

    Args:
        config: Sizes of the tower.
        weights: The tower's tensors by their names below the prefix, such as `blocks.0.norm1.weight`.
        writer: The graph.
    """

    def __init__(self, config: VisionConfig, weights: Mapping[str, StoredTensor], writer: GraphWriter) -> None:
        self.config, self.weights, self.g = config, weights, writer

    def weight(self, name: str, shape: tuple[int, ...], view: tuple[int, ...] | None = None) -> str:
        """A weight of that shape, seen as `view`.

        Raises:
            CheckpointError: If it is missing, or has another shape or dtype.
        """
        if name not in self.weights:
            raise CheckpointError(
                f"the checkpoint's vision tower has no tensor {name!r}.",
                hint="Pass a complete checkpoint; a checkpoint stripped of its vision weights cannot be written.",
            )
        return self.g.weight(name, self.weights[name], shape, view)

    def norm(self, name: str) -> str:
        """The scale of an RMS normalisation."""
        return self.weight(name, (self.config.hidden_size,))

    def embed(self, patches: str) -> str:
        """The patch embedding of [patches, patch_width]: a convolution whose stride is its kernel is one product."""
        config = self.config
        side = config.patch_size
        kernel = (config.hidden_size, config.in_channels, config.temporal_patch_size, side, side)
        matrix = self.weight(PATCH_KERNEL, kernel, (config.hidden_size, config.patch_width))
        return self.g.node("Gemm", [patches, matrix], transB=1)

    def joint_projections(self, x: str, name: str) -> str:
        """Queries, keys and values side by side, [rows, 3 * hidden], of the attention of that name."""
        hidden = self.config.hidden_size
        if f"{name}.qkv.weight" in self.weights:
            return self.linear(x, f"{name}.qkv", 3 * hidden, hidden)
        return self.g.node("Concat", self.projections(x, name), axis=1)

    def projections(self, x: str, name: str) -> list[str]:
        """Queries, keys and values, each [rows, hidden], of the attention of that name."""
        g, hidden = self.g, self.config.hidden_size
        if f"{name}.q.weight" in self.weights:
            return [self.linear(x, f"{name}.{part}", hidden, hidden) for part in "qkv"]
        return g.nodes("Split", [self.joint_projections(x, name), g.constant([hidden] * 3)], [True] * 3, axis=1)

    def linear(self, x: str, name: str, outputs: int, inputs: int) -> str:
        """A linear layer of [rows, inputs]; `transB` takes the stored layout as it is."""
        weight, bias = self.weight(f"{name}.weight", (outputs, inputs)), self.weight(f"{name}.bias", (outputs,))
        return self.g.node("Gemm", [x, weight, bias], transB=1)
