"""Walks the graphs and tensors of an ONNX model, and reads and writes references to data in other files.

It opens none of these files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel.core.stored_tensor import StoredTensor

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto


def bodies_of(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    """Yield the graphs in attributes of operators, such as the branches of an If; not those nested in them."""
    return _bodies(_attributes(nodes))


def graphs_in(*graphs: GraphProto) -> Iterator[GraphProto]:
    """Yield graphs and all graphs nested in them, at any depth."""
    ahead = list(graphs)
    while ahead:
        graph = ahead.pop()
        yield graph
        ahead += bodies_of(graph.node)


def tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield the weights of a graph and the constants of its operators, also sparse ones; not those of nested graphs."""
    yield from graph.initializer
    yield from _parts(graph.sparse_initializer)
    yield from _constants(_attributes(graph.node))


def every_tensor(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a model, also of its functions and its training graphs."""
    graphs = [model.graph]
    for training in model.training_info:
        graphs += (training.initialization, training.algorithm)
    for function in model.functions:
        attributes = [*function.attribute_proto, *_attributes(function.node)]
        yield from _constants(attributes)
        graphs += _bodies(attributes)
    for graph in graphs_in(*graphs):
        yield from tensors_of(graph)


def _attributes(nodes: Iterable[NodeProto]) -> Iterator[AttributeProto]:
    return chain.from_iterable(node.attribute for node in nodes)


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
        yield from _parts([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])
        yield from _parts(attribute.sparse_tensors)


def _parts(tensors: Iterable[SparseTensorProto]) -> Iterator[TensorProto]:
    return chain.from_iterable((sparse.values, sparse.indices) for sparse in tensors)


@dataclass(frozen=True, slots=True)
class ExternalData:
    """A tensor's reference to data in another file.

    Attributes:
        location: A path relative to the model's folder; an untrusted model may contain any path.
        offset: First byte in the file.
        length: Number of bytes; None if not given: it follows from shape and dtype.
    """

    location: str
    offset: int = 0
    length: int | None = None

    @classmethod
    def of(cls, tensor: TensorProto) -> ExternalData:
        """Read a tensor's reference; ValueError if a field is given twice, or a number is malformed or negative."""
        fields = {entry.key: entry.value for entry in tensor.external_data}
        if len(fields) != len(tensor.external_data):
            raise ValueError("a field is given twice")
        offset = int(fields.get("offset", 0))
        length = int(fields["length"]) if "length" in fields else None
        if offset < 0 or (length is not None and length < 0):
            raise ValueError("offset and length must not be negative")
        return cls(fields.get("location", ""), offset, length)

    @classmethod
    def at(cls, stored: StoredTensor, folder: Path) -> ExternalData:
        """Refer to a stored tensor from a model in `folder`; the tensor's file must be in that folder, at any depth."""
        return cls(stored.file.relative_to(folder).as_posix(), stored.offset, stored.length)


def is_external(tensor: TensorProto) -> bool:
    """Return whether a tensor's data is in another file."""
    return tensor.data_location == tensor.EXTERNAL


def point_at(tensor: TensorProto, place: ExternalData) -> None:
    """Make a tensor refer to data in another file, and replace any reference it had."""
    tensor.data_location = tensor.EXTERNAL
    del tensor.external_data[:]
    for key, value in asdict(place).items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


def hold_data(tensor: TensorProto, data: bytes) -> None:
    """Store a tensor's data in the model."""
    tensor.raw_data = data
    tensor.data_location = tensor.DEFAULT
    del tensor.external_data[:]
