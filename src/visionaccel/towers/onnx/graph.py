"""Any tower as one ONNX graph: a walk from patches to embeddings, with the operators of a dialect.

Rows are patches from the embedding to the merger, in window order where the tower has windows. `AnyGrid` takes the
grid-dependent tables as inputs, and the frames of a call as a batch, so all frames of one call must have the same
height and width. `FixedGrid` and `Bucket` have fixed shapes (`fixed`) in standard operators; in ONNX Runtime's own
operators they are the graph for any grid with its tables bound (`fixed.bind_tables`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from visionaccel.core.program import (
    EMBEDDINGS,
    PATCH_EMBEDDINGS,
    PIXELS,
    WINDOW_EMBEDDINGS,
    AnyGrid,
    Coverage,
    HostSplit,
    OperatorDialect,
)
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import Activation, Gated, Linear, Merge, Norm, Step, TowerSpec
from visionaccel.towers.onnx.fixed import FixedOperators, bind_tables, pad_embeddings
from visionaccel.towers.onnx.operators import MicrosoftOperators, Operators, StandardOperators
from visionaccel.towers.onnx.writer import GraphWeights, GraphWriter
from visionaccel.towers.tables import signature


def write_graph(
    spec: TowerSpec,
    weights: Mapping[str, StoredTensor],
    writer: GraphWriter,
    coverage: Coverage,
    host: HostSplit | None,
    dialect: OperatorDialect,
) -> onnx.ModelProto:
    """Write a tower.

    Args:
        spec: The tower.
        weights: Its tensors by the spec's names.
        writer: An empty writer; its precision is that of weights and activations.
        coverage: Which grids the program takes.
        host: What is left to the host, in standard operators of fixed shapes only; None for the whole tower.
        dialect: Whose operators to write.

    Raises:
        CheckpointError: If a weight is missing, or of a dtype that graphs do not refer to.
    """
    references = GraphWeights(spec, weights, writer)
    operators: Operators
    finish = None
    if isinstance(coverage, AnyGrid):
        operators = {"microsoft": MicrosoftOperators, "standard": StandardOperators}[dialect](spec, writer, references)
    elif dialect == "microsoft":
        tables = bind_tables(spec, writer, coverage)
        operators = MicrosoftOperators(spec, writer, references, tables)
        finish = tables.get(EMBEDDINGS)
    else:
        operators = FixedOperators(spec, writer, references, coverage, host)
    out = _Walk(spec, writer, references, operators).write(PATCH_EMBEDDINGS if host else operators.table(PIXELS), host)
    if finish is not None:
        out = pad_embeddings(writer, out, finish)
    writer.rename(out, WINDOW_EMBEDDINGS if host else EMBEDDINGS)
    inputs, outputs = signature(spec, coverage, host)
    return writer.model("vision_tower", inputs, outputs, opset=operators.opset, microsoft=operators.microsoft)


class _Walk:
    """One writing: the tower's steps in their order, over values of the graph."""

    def __init__(self, spec: TowerSpec, writer: GraphWriter, weights: GraphWeights, operators: Operators) -> None:
        self.spec, self.g, self.w, self.operators = spec, writer, weights, operators

    def write(self, given: str, host: HostSplit | None) -> str:
        """From patches, or from embedded ones, to float32 embeddings in the order of the program's edge."""
        spec, g, operators = self.spec, self.g, self.operators
        operators.prepare()
        x = g.narrow(given)
        if host is None:
            x = self.apply(spec.embed, "", x)
            if spec.positions is not None:
                x = g.node("Add", [x, self.positions()])
        x = operators.ordered(x, split=host is not None)
        update, levels = "", list[str]()
        for block in range(spec.depth):
            place = f"blocks.{block}."
            x, normed = self.add_norm(x, update, spec.norm1, place)
            attended = self.w.linear(spec.proj, place, operators.attention(normed, place, block))
            x, normed = self.add_norm(x, attended, spec.norm2, place)
            update = self.apply(spec.mlp, place, normed)
            for level in spec.levels_after(block):
                x, update = g.node("Add", [x, update]) if update else x, ""
                levels.append(self.apply(spec.deepstack_merger, f"deepstack.{level}.", x))
        first, *others = spec.merger
        if isinstance(first, Norm):
            _, x = self.add_norm(x, update, first, "")
        else:
            x, others = g.node("Add", [x, update]) if update else x, [first, *others]
        x = self.apply(others, "", x)
        if levels:
            x = g.node("Concat", [x, *levels], axis=1)
        if operators.reverse_index:
            x = g.node("Gather", [x, operators.reverse_index], axis=0)
        return g.widen(x)

    def add_norm(self, x: str, update: str, norm: Norm, place: str) -> tuple[str, str]:
        """X + update, and its normalisation."""
        scale, bias = self.w.norm(norm, place)
        if not update:
            return x, self.operators.norm(norm, x, scale, bias)
        return self.operators.add_norm(norm, x, update, scale, bias)

    def apply(self, steps: Sequence[Step], place: str, x: str) -> str:
        """A sequence of steps over rows."""
        for step in steps:
            match step:
                case Norm():
                    x = self.operators.norm(step, x, *self.w.norm(step, place))
                case Linear():
                    x = self.w.linear(step, place, x)
                case Activation():
                    x = self.operators.activation(step.kind, x)
                case Gated():
                    gate = self.operators.activation(step.activation, self.w.linear(step.gate, place, x))
                    product = self.g.node("Mul", [gate, self.w.linear(step.up, place, x)])
                    x = self.w.linear(step.down, place, product)
                case Merge():
                    x = self.operators.tokens(x)
        return x

    def positions(self) -> str:
        """The learned positions of every patch in input order; one gather a tap: no [P, taps, hidden] is made."""
        positions, g = self.spec.positions, self.g
        assert positions is not None
        index, weight = (self.operators.table(name) for name in ("position_index", "position_weight"))
        table = self.w.weight(f"{positions.name}.weight")
        total = ""
        for tap in range(positions.taps):
            place = g.constant(np.int64(tap))
            rows = g.widen(g.node("Gather", [table, g.node("Gather", [index, place], axis=0)], axis=0))
            rows = g.node("Mul", [rows, g.node("Gather", [weight, place], axis=0)])
            total = g.node("Add", [total, rows]) if total else rows
        return g.narrow(total)
