"""Walks through an ONNX model: its graphs, those within their operators, and every tensor that one of them holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["bodies_of", "every_tensor", "graphs_in", "tensors_of"]


def bodies_of(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """The graphs that operators hold as attributes, such as the branches of an If; not those within them."""
    return _bodies(attribute for node in nodes for attribute in node.attribute)


def graphs_in(*graphs: GraphProto) -> Iterator[GraphProto]:
    """Graphs and all that are within them, at any depth."""
    ahead = list(graphs)
    while ahead:
        graph = ahead.pop()
        yield graph
        ahead += bodies_of(graph.node)


def tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    """Weights of a graph and constants of its operators, sparse ones too; not those of graphs within."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _constants(attribute for node in graph.node for attribute in node.attribute)


def every_tensor(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model, also of its functions and of what trains it."""
    graphs = [model.graph]
    for training in model.training_info:
        graphs += (training.initialization, training.algorithm)
    for function in model.functions:
        of_nodes = chain.from_iterable(node.attribute for node in function.node)
        attributes = [*function.attribute_proto, *of_nodes]
        yield from _constants(attributes)
        graphs += _bodies(attributes)
    for graph in graphs_in(*graphs):
        yield from tensors_of(graph)


def _bodies(attributes: Iterable[AttributeProto]) -> Iterator[GraphProto]:
    for attribute in attributes:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _constants(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        own = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for sparse in (*own, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
