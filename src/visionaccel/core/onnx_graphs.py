"""What is in an ONNX model: its graphs, those within their operators, every tensor, and where its data lie.

Data may lie in other files. Such places are read and stated here; nothing here follows one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel.core.stored_tensor import StoredTensor

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto


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


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where a tensor says that its data lie.

    Attributes:
        location: A path relative to the model's folder; an untrusted model may state any.
        offset: First byte in the file.
        length: Number of bytes; None if it is not stated and follows from shape and dtype.
    """

    location: str
    offset: int = 0
    length: int | None = None

    @classmethod
    def of(cls, tensor: TensorProto) -> ExternalData:
        """The place that a tensor states.

        Raises:
            ValueError: If a field is given twice, or a number is not one or is negative.
        """
        stated = {entry.key: entry.value for entry in tensor.external_data}
        if len(stated) != len(tensor.external_data):
            raise ValueError("a field is given twice")
        offset = int(stated.get("offset", 0))
        length = int(stated["length"]) if "length" in stated else None
        if offset < 0 or (length is not None and length < 0):
            raise ValueError("a place in a file is not negative")
        return cls(stated.get("location", ""), offset, length)

    @classmethod
    def at(cls, stored: StoredTensor, folder: Path) -> ExternalData:
        """The place of a stored tensor, for a model in `folder`, which must hold the file at any depth."""
        return cls(stored.file.relative_to(folder).as_posix(), stored.offset, stored.length)


def is_external(tensor: TensorProto) -> bool:
    """Whether a tensor's data lie in another file."""
    return tensor.data_location == tensor.EXTERNAL


def point_at(tensor: TensorProto, place: ExternalData) -> None:
    """Make a tensor state only that place of its data."""
    tensor.data_location = tensor.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", place.location), ("offset", place.offset), ("length", place.length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


def hold_data(tensor: TensorProto, data: bytes) -> None:
    """Put a tensor's data into the model."""
    tensor.raw_data = data
    tensor.data_location = tensor.DEFAULT
    del tensor.external_data[:]
