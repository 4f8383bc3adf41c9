"""A tower's weights as a graph refers to them: by name, with the shape that the description demands."""

from __future__ import annotations

from collections.abc import Mapping

from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import APART, JOINT, Linear, Norm, TowerSpec
from visionaccel.errors import CheckpointError
from visionaccel.towers.onnx.writer import GraphWriter

__all__ = ["GraphWeights"]


class GraphWeights:
    """References to a tower's weights in one graph, and the products with them.

    Args:
        spec: The tower.
        weights: Its tensors by the spec's names.
        writer: The graph.
    """

    def __init__(self, spec: TowerSpec, weights: Mapping[str, StoredTensor], writer: GraphWriter) -> None:
        self._spec, self._weights, self._g = spec, weights, writer

    def weight(self, name: str, view: tuple[int, ...] | None = None) -> str:
        """A weight, seen as `view`.

        Raises:
            CheckpointError: If it is missing, or of a dtype that graphs do not refer to.
        """
        if name not in self._weights:
            raise CheckpointError(
                f"the checkpoint's vision tower has no tensor {name!r}.",
                hint="Pass a complete checkpoint; a checkpoint stripped of its vision weights cannot be written.",
            )
        return self._g.weight(name, self._weights[name], view)

    def norm(self, step: Norm, place: str) -> tuple[str, str]:
        """Scale and bias of a normalisation; the bias is empty where it has none."""
        name = place + step.name
        return self.weight(f"{name}.weight"), self.weight(f"{name}.bias") if step.kind == "layer" else ""

    def linear(self, step: Linear, place: str, x: str) -> str:
        """A linear layer of [rows, inputs]; `transB` takes the stored layout as it is."""
        g, name, matrix = self._g, place + step.name, (step.outputs, step.inputs)
        if step.kernel:  # its axes are moved, which a runtime does once
            moved = g.node("Transpose", [self.weight(f"{name}.weight")], perm=[0, 2, 3, 1])
            weight = g.node("Reshape", [moved, g.constant(matrix)])
        else:
            weight = self.weight(f"{name}.weight", matrix)
        bias = [self.weight(f"{name}.bias")] if step.bias else []
        return g.node("Gemm", [x, weight, *bias], transB=1)

    def joint_projections(self, x: str, place: str) -> str:
        """Queries, keys and values of a block side by side: [rows, 3 * hidden]."""
        if f"{place}{APART[0]}.weight" in self._weights and f"{place}{JOINT}.weight" not in self._weights:
            return self._g.node("Concat", self.projections(x, place), axis=1)
        return self.linear(self._spec.qkv, place, x)

    def projections(self, x: str, place: str) -> list[str]:
        """Queries, keys and values of a block, each [rows, hidden]."""
        hidden = self._spec.hidden
        if f"{place}{APART[0]}.weight" in self._weights:
            return [self.linear(Linear(part, hidden, hidden, self._spec.qkv.bias), place, x) for part in APART]
        joint = self.joint_projections(x, place)
        return self._g.nodes("Split", [joint, self._g.constant([hidden] * 3)], [True] * 3, axis=1)
