"""Towers as ONNX graphs."""

from collections.abc import Mapping
from pathlib import Path

from visionaccel.core.program import (
    EMBEDDINGS,
    WINDOW_EMBEDDINGS,
    AnyGrid,
    Coverage,
    HostSplit,
    OperatorDialect,
    Precision,
)
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import TowerSpec
from visionaccel.towers.onnx.any_grid import MicrosoftGraph, StandardGraph
from visionaccel.towers.onnx.fixed_shapes import FixedShapesGraph
from visionaccel.towers.onnx.graph import TowerGraph
from visionaccel.towers.onnx.writer import GraphWriter
from visionaccel.towers.tables import signature

__all__ = ["write_model"]


def write_model(
    spec: TowerSpec,
    weights: Mapping[str, StoredTensor],
    folder: Path,
    coverage: Coverage,
    precision: Precision,
    host: HostSplit | None,
    dialect: OperatorDialect,
) -> bytes:
    """Write a tower as a serialized model that refers to its weights relative to `folder`; see `Tower.onnx_model`.

    CheckpointError if a weight is missing or has an unsupported dtype.
    """
    writer = GraphWriter(folder, precision)
    graph: TowerGraph
    if dialect == "microsoft":
        graph = MicrosoftGraph(spec, weights, writer, coverage)
    elif isinstance(coverage, AnyGrid):
        graph = StandardGraph(spec, weights, writer, coverage)
    else:
        graph = FixedShapesGraph(spec, weights, writer, coverage, host)
    embeddings = graph.write(split=host is not None)
    writer.rename(embeddings, EMBEDDINGS if host is None else WINDOW_EMBEDDINGS)
    return bytes(writer.model(*signature(spec, coverage, host), opset=graph.opset).SerializeToString())
