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

    def weight(self, name: str, shape: tuple[int, ...], view: tuple[int, ...] | None = None) -> str:
        """A weight of that shape, seen as `view`.

        Raises:
            CheckpointError: If it is missing, or has another shape or dtype.
        """
        if name not in self._weights:
            raise CheckpointError(
                f"the checkpoint's vision tower has no tensor {name!r}.",
                hint="Pass a complete checkpoint; a checkpoint stripped of its vision weights cannot be written.",
            )
        return self._g.weight(name, self._weights[name], shape, view)

    def norm(self, step: Norm, place: str) -> tuple[str, str]:
        """Scale and bias of a normalisation; the bias is empty where it has none."""
        name, shape = place + step.name, (step.width,)
        return self.weight(f"{name}.weight", shape), self.weight(f"{name}.bias", shape) if step.kind == "layer" else ""

    def linear(self, step: Linear, place: str, x: str) -> str:
        """A linear layer of [rows, inputs]; `transB` takes the stored layout as it is."""
        g, name = self._g, place + step.name
        stored = self._spec.stored_shape(step)
        if step.kernel:  # its axes are moved, which a runtime does once
            moved = g.node("Transpose", [self.weight(f"{name}.weight", stored)], perm=[0, 2, 3, 1])
            weight = g.node("Reshape", [moved, g.constant([step.outputs, step.inputs])])
        else:
            weight = self.weight(f"{name}.weight", stored, (step.outputs, step.inputs))
        bias = [self.weight(f"{name}.bias", (step.outputs,))] if step.bias else []
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
