"""Writes any tower as one ONNX graph, from patches to embeddings; `any_grid` and `fixed_shapes` add what differs.

Rows are patches [patches, hidden] from the embedding to the merger, in window order where the tower has windows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from visionaccel.core.program import PATCH_EMBEDDINGS, PIXELS
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import (
    APART,
    Activation,
    ActivationKind,
    Gated,
    Linear,
    Merge,
    Norm,
    Positions,
    Step,
    TowerSpec,
)
from visionaccel.errors import CheckpointError
from visionaccel.towers.onnx.writer import GraphWriter


class TowerGraph(ABC):
    """Writes a tower into an empty graph of `patches` rows, -1 for any number. `weights` have the spec's names.

    A subclass writes norms, activations and attention.

    Attributes:
        opset: Version of the standard operators.
        order_index: int64 [tokens]; for each token in the graph's own order, its place in the order of the input. Empty
            if the orders are the same.
        reverse_index: int64 [tokens]; its inverse.
        pads: The padding of the embeddings, as the operator `Pad` takes it; empty for none.
    """

    opset: ClassVar[int]

    def __init__(
        self, spec: TowerSpec, weights: Mapping[str, StoredTensor], writer: GraphWriter, patches: int = -1
    ) -> None:
        self.spec, self._weights, self.g = spec, weights, writer
        self.order_index, self.reverse_index, self.pads = "", "", ""
        self.rows = writer.constant([patches, spec.hidden])
        tokens = -1 if patches < 0 else patches // spec.merged
        self._tokens = writer.constant([tokens, spec.merged * spec.hidden])

    @abstractmethod
    def norm(self, norm: Norm, place: str, x: str) -> str:
        """Normalise over the last axis."""

    def add_norm(self, norm: Norm, place: str, x: str, update: str) -> tuple[str, str]:
        """Return x + update, where `update` may be empty, and its normalisation."""
        total = self._add(x, update)
        return total, self.norm(norm, place, total)

    @abstractmethod
    def activation(self, kind: ActivationKind, x: str) -> str:
        """Apply a function to each element."""

    @abstractmethod
    def attention(self, x: str, place: str, block: int) -> str:
        """Compute a block's attention, from its normalised rows to the input of its last projection."""

    def write(self, *, split: bool) -> str:
        """Write the tower and return its float32 embeddings, in the order of the input.

        With `split` the host embeds the patches: the input is [tokens, merged, hidden].
        """
        spec, g = self.spec, self.g
        x = g.narrow(PATCH_EMBEDDINGS) if split else self._embed(g.narrow(PIXELS))
        if self.order_index:
            x = g.node("Gather", [x if split else self._merge(x), self.order_index], axis=0)
        if split or self.order_index:
            x = g.node("Reshape", [x, self.rows])
        update, levels = "", list[str]()
        for block in range(spec.depth):
            place = f"blocks.{block}."
            x, normed = self.add_norm(spec.norm1, place, x, update)
            attended = self.linear(spec.proj, place, self.attention(normed, place, block))
            x, normed = self.add_norm(spec.norm2, place, x, attended)
            update = self._apply(spec.mlp, place, normed)
            for level in spec.levels_after(block):
                x, update = self._add(x, update), ""
                levels.append(self._apply(spec.deepstack_merger, f"deepstack.{level}.", x))
        first, *others = spec.merger
        if isinstance(first, Norm):
            _, x = self.add_norm(first, "", x, update)
            x = self._apply(others, "", x)
        else:
            x = self._apply(spec.merger, "", self._add(x, update))
        if levels:
            x = g.node("Concat", [x, *levels], axis=1)
        if self.reverse_index:
            x = g.node("Gather", [x, self.reverse_index], axis=0)
        x = g.widen(x)
        return g.node("Pad", [x, self.pads]) if self.pads else x

    def _embed(self, x: str) -> str:
        x = self._apply(self.spec.embed, "", x)
        return x if self.spec.positions is None else self.g.node("Add", [x, self._positions(self.spec.positions)])

    def _positions(self, positions: Positions) -> str:
        """Compute learned positions in input order, one tap at a time, so that [P, taps, hidden] is never in memory."""
        g = self.g
        table = self.weight(f"{positions.name}.weight")
        total = ""
        for tap in range(positions.taps):
            place = g.constant(np.int64(tap))
            rows = g.widen(g.node("Gather", [table, g.node("Gather", ["position_index", place], axis=0)], axis=0))
            rows = g.node("Mul", [rows, g.node("Gather", ["position_weight", place], axis=0)])
            total = g.node("Add", [total, rows]) if total else rows
        return g.narrow(total)

    def _add(self, x: str, update: str) -> str:
        return self.g.node("Add", [x, update]) if update else x

    def norm_weights(self, norm: Norm, place: str) -> list[str]:
        """Return the scale, and the bias if the norm has one."""
        name = place + norm.name
        return [self.weight(f"{name}.{part}") for part in (("weight", "bias") if norm.kind == "layer" else ("weight",))]

    def _apply(self, steps: Sequence[Step], place: str, x: str) -> str:
        for step in steps:
            match step:
                case Norm():
                    x = self.norm(step, place, x)
                case Linear():
                    x = self.linear(step, place, x)
                case Activation():
                    x = self.activation(step.kind, x)
                case Gated():
                    gate = self.activation(step.activation, self.linear(step.gate, place, x))
                    product = self.g.node("Mul", [gate, self.linear(step.up, place, x)])
                    x = self.linear(step.down, place, product)
                case Merge():
                    x = self._merge(x)
        return x

    def _merge(self, x: str) -> str:
        """Put the rows of a token side by side: [tokens, merged * hidden]."""
        return self.g.node("Reshape", [x, self._tokens])

    def weight(self, name: str, view: tuple[int, ...] | None = None) -> str:
        """Return a weight by the spec's name, in the shape `view` if given."""
        if name not in self._weights:
            raise CheckpointError(
                f"the checkpoint's vision tower has no tensor {name!r}.",
                hint="Pass a complete checkpoint, not one that was stripped of its vision weights.",
            )
        return self.g.weight(name, self._weights[name], view)

    def linear(self, step: Linear, place: str, x: str) -> str:
        """Apply a linear layer to [rows, inputs]; with `transB` the weight keeps its stored layout."""
        g, name, matrix = self.g, place + step.name, (step.outputs, step.inputs)
        if step.kernel:  # a runtime moves the axes once, when it loads the constant
            moved = g.node("Transpose", [self.weight(f"{name}.weight")], perm=[0, 2, 3, 1])
            weight = g.node("Reshape", [moved, g.constant(matrix)])
        else:
            weight = self.weight(f"{name}.weight", matrix)
        bias = [self.weight(f"{name}.bias")] if step.bias else []
        return g.node("Gemm", [x, weight, *bias], transB=1)

    def projections(self, x: str, place: str) -> list[str]:
        """Compute queries, keys and values as their weights are stored: one of [rows, 3 * hidden], or three."""
        if f"{place}{APART[0]}.weight" not in self._weights:
            return [self.linear(self.spec.qkv, place, x)]
        hidden = self.spec.hidden
        return [self.linear(Linear(part, hidden, hidden, self.spec.qkv.bias), place, x) for part in APART]
