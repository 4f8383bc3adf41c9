"""The graph of an untrusted ONNX model: which node makes which tensor, and the values of single constants.

Weights are not loaded with the model. External data is read tensor by tensor, from files in the model's own folder.
"""

from __future__ import annotations

import math
import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from visionaccel.bundle import check_names
from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.dtypes import DTYPES, OF_ONNX
from visionaccel.core.onnx_graphs import ExternalData, bodies_of, graphs_in, is_external, tensors_of
from visionaccel.errors import BundleError

EXPORT_AGAIN = "Export and compile the tower again."
OTHER_CHECKPOINT = "Pass the checkpoint that the artifact was compiled from."
_WRITE_AGAIN = "Export the model again."
_AGAIN = "Fetch the folder again, or export and compile the tower again."
_MOST_MODEL_BYTES = 2**31
"""Protobuf's own limit."""

_MOST_PARTS = 200_000
"""The tower of the 72B model has a few thousand, and checking each takes microseconds."""

_MOST_CONSTANT_BYTES = 2**28
"""The most bytes of one constant; a patch embedding has 6 MB."""

_MOST_DIMENSIONS = 32
_MOST_FOLDS = 64
"""The most operators to compute for one constant: if each reads the one before twice, the work doubles each time."""

_TYPES: Mapping[int, np.dtype[Any]] = {
    DTYPES[name].onnx: DTYPES[name].numpy for name in ("float32", "float16", "bfloat16", "int32", "int64")
}
"""The dtypes that constants of a host part may have."""

_CONSTANTS = {
    "value_int": ("i", np.int64, onnx.AttributeProto.INT),
    "value_ints": ("ints", np.int64, onnx.AttributeProto.INTS),
    "value_float": ("f", np.float32, onnx.AttributeProto.FLOAT),
    "value_floats": ("floats", np.float32, onnx.AttributeProto.FLOATS),
    "value": ("t", None, onnx.AttributeProto.TENSOR),
}
"""Attributes of a `Constant`: the protobuf field with the value, its dtype and the attribute's declared type."""


class OnnxGraph:
    """A model's main graph, which is not changed. Nodes are identified by their index in `nodes`.

    Attributes:
        weights: Stored tensors by name.
        makers: The node that makes each computed tensor.

    Raises:
        BundleError: If two tensors have the same name, or share bytes of a file.
    """

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.model, self.path = model, path
        _check_tensors(model, path)
        self.nodes: Sequence[onnx.NodeProto] = model.graph.node
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers: dict[str, int] = {}
        self._readers: dict[str, list[int]] = defaultdict(list)
        for place, node in enumerate(self.nodes):
            self.makers |= dict.fromkeys(filter(None, node.output), place)
            for name in _reads(node):
                self._readers[name].append(place)

    @classmethod
    def load(cls, path: Path) -> OnnxGraph:
        """Read a model without its external data; BundleError if it is not a readable ONNX model."""
        try:
            model = onnx.load_model_from_string(read_bounded(path, _MOST_MODEL_BYTES - 1))
        except Exception as error:  # protobuf's decoding error is not part of its public interface
            raise BundleError(f"{path} is not an ONNX model: {error}", hint=_AGAIN) from error
        if any(count > _MOST_PARTS for count in _parts(model.graph)):
            raise BundleError(f"{path} has more than {_MOST_PARTS} operators, weights and tensors.", hint=_AGAIN)
        # Protobuf returns bytes for a string that is not UTF-8.
        if any(isinstance(text, bytes) for text in _texts(model)):
            raise BundleError(f"{path} contains names that are not text.", hint=_AGAIN)
        if not model.graph.node:
            raise BundleError(f"{path} contains no operators.", hint=_AGAIN)
        return cls(model, path)

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs; unknown sizes are names."""
        return tuple(_spec(value) for value in self.model.graph.input if value.name not in self.weights)

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs; unknown sizes are names."""
        return tuple(_spec(value) for value in self.model.graph.output)

    @cached_property
    def declared(self) -> Mapping[str, TensorSpec]:
        """The tensors whose shape and dtype the model declares."""
        graph = self.model.graph
        return {value.name: _spec(value) for value in (*graph.value_info, *graph.output, *graph.input)}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.makers or tensor in self.declared or tensor in self.weights

    def ancestors(self, tensors: Iterable[str], cut: Iterable[str] = ()) -> frozenset[int]:
        """Return the nodes that tensors depend on, without following the tensors of `cut`."""

        def makers(tensor: str) -> list[int]:
            return [self.makers[tensor]] if tensor in self.makers else []

        return _reached(tensors, cut, makers, lambda place: _reads(self.nodes[place]))

    def descendants(self, tensors: Iterable[str], cut: Iterable[str] = ()) -> frozenset[int]:
        """Return the nodes that depend on tensors, without following the tensors of `cut`."""
        return _reached(
            tensors, cut, lambda name: self._readers.get(name, []), lambda place: filter(None, self.nodes[place].output)
        )

    def reads(self, places: Iterable[int]) -> frozenset[str]:
        """Return every tensor that these nodes and their subgraphs read."""
        return frozenset(name for place in places for name in _reads(self.nodes[place]))

    def values(self, tensor: onnx.TensorProto) -> NDArray[Any] | None:
        """Return the values of a stored tensor; None for other dtypes than those of host parts.

        Raises:
            BundleError: If its data is damaged, missing or in a different folder.
        """
        dtype = _TYPES.get(tensor.data_type)
        if dtype is None:
            return None
        where = f"{self.path}: tensor {tensor.name!r}"
        if len(tensor.dims) > _MOST_DIMENSIONS:  # the product of very many sizes alone takes minutes
            raise BundleError(f"{where} has too many dimensions: {len(tensor.dims)}.", hint=_AGAIN)
        shape = tuple(tensor.dims)
        items = math.prod(shape)
        if min(shape, default=1) < 0 or items * dtype.itemsize > _MOST_CONSTANT_BYTES:
            raise BundleError(f"{where} has the impossible shape {list(shape)}.", hint=_AGAIN)
        try:
            if not is_external(tensor):
                return numpy_helper.to_array(tensor)
            place, size = ExternalData.of(tensor), items * dtype.itemsize
            file = plain_file(self.path.parent, place.location, where)
            if place.length not in (None, size) or place.offset + size > file.stat().st_size:
                raise BundleError(f"{where} is not completely inside {file.name}, or has the wrong size.", hint=_AGAIN)
            return np.fromfile(file, dtype, items, offset=place.offset).reshape(shape)
        except (ValueError, TypeError, OverflowError, OSError) as error:
            raise BundleError(f"{where} cannot be read: {error}", hint=_AGAIN) from error

    def constant(self, tensor: str, folds: Iterator[int] | None = None) -> NDArray[Any] | None:
        """Return the values of a weight, or of a tensor that a few simple operators make from weights; otherwise None.

        `folds` has an item for each operator that may still be computed.

        Raises:
            BundleError: If its data is damaged, missing or in a different folder.
        """
        if tensor in self.weights:
            return self.values(self.weights[tensor])
        folds = iter(range(_MOST_FOLDS)) if folds is None else folds
        place = self.makers.get(tensor)
        if place is None or next(folds, None) is None:
            return None
        node = self.nodes[place]
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            return self._of_constant(node)
        names = given_inputs(node)
        if node.op_type not in ("Identity", "Cast", "Reshape", "Transpose") or not names:
            return None
        given = []
        for name in names:
            if (values := self.constant(name, folds)) is None:
                return None
            given.append(values)
        found = self.evaluate(node, given)
        return found if found.dtype in _TYPES.values() else None

    def evaluate(self, node: onnx.NodeProto, given: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Return a standard operator's output for values of its `given_inputs`; BundleError if it is malformed."""
        latest = onnx.defs.onnx_opset_version()
        stated = [each.version for each in self.model.opset_import if each.domain in ("", "ai.onnx")]
        names = given_inputs(node)
        alone = onnx.NodeProto(op_type=node.op_type, input=names, output=node.output, attribute=node.attribute)
        fed = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names)]
        try:
            graph = helper.make_graph([alone], "alone", fed, [onnx.ValueInfoProto(name=node.output[0])])
            evaluator = ReferenceEvaluator(graph, opsets={"": min([latest, *stated])})
            with np.errstate(all="ignore"):
                (found,) = evaluator.run(None, dict(zip(names, given, strict=True)))
        except Exception as error:  # an operator may raise anything for inputs that it does not support
            where = f"{self.path}: {node.op_type} {node.name!r}"
            raise BundleError(f"{where} is malformed: {error}", hint=_AGAIN) from error
        return np.asarray(found)

    def _of_constant(self, node: onnx.NodeProto) -> NDArray[Any] | None:
        for attribute in node.attribute:
            if attribute.name not in _CONSTANTS:
                continue
            field, dtype, kind = _CONSTANTS[attribute.name]
            # Some exporters leave the type out.
            if attribute.ref_attr_name or attribute.type not in (kind, onnx.AttributeProto.UNDEFINED):
                where = f"{self.path}: Constant {node.name!r}"
                raise BundleError(f"{where} is malformed: its {attribute.name} has the wrong type.", hint=_AGAIN)
            value = getattr(attribute, field)
            return self.values(value) if dtype is None else np.array(value, dtype)
        return None


def _reached(
    tensors: Iterable[str],
    cut: Iterable[str],
    nodes_at: Callable[[str], Iterable[int]],
    tensors_at: Callable[[int], Iterable[str]],
) -> frozenset[int]:
    """Return the nodes that can be reached from tensors, without following the tensors of `cut`."""
    found: set[int] = set()
    ends = set(cut)
    ahead = [name for name in tensors if name not in ends]
    while ahead:
        for place in nodes_at(ahead.pop()):
            if place not in found:
                found.add(place)
                ahead += [name for name in tensors_at(place) if name not in ends]
    return frozenset(found)


def squeezed(shape: Sequence[int | str]) -> tuple[int | str, ...]:
    """Return a shape without its ones."""
    return tuple(size for size in shape if size != 1)


def given_inputs(node: onnx.NodeProto) -> list[str]:
    """Return a node's inputs without the empty optional ones at the end."""
    names = list(node.input)
    while names and not names[-1]:
        names.pop()
    return names


def plain_file(folder: Path, name: str, where: str) -> Path:
    """Return the file that something in `folder` refers to by name; BundleError unless it is an existing file there."""
    if not name or name != Path(name).name or name in (".", "..") or any(c in name for c in "\\/:\0"):
        raise BundleError(
            f"{where} refers to {name[:200]!r}, which is not a plain file name in the same folder.",
            hint="Do not use this folder, or put all files into one folder and compile again.",
        )
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{where} refers to {path}, which does not exist.", hint="Fetch the missing file.")
    check_link(path, folder)
    return path


def check_link(file: Path, folder: Path) -> None:
    """Refuse with BundleError a file that is outside a folder once links are followed.

    In a Hugging Face cache, links from `<repository>/snapshots/<revision>` to `<repository>/blobs` are accepted.
    """
    real = Path(os.path.realpath(file))
    if real.is_relative_to(os.path.realpath(folder)):
        return
    link = Path(os.path.realpath(file.parent), file.name)
    for place, name in enumerate(link.parts[:-2]):
        if name == "snapshots" and real.is_relative_to(Path(*link.parts[:place], "blobs")):
            return
    raise BundleError(
        f"{file} points to {real}, outside of {folder}.",
        hint="Do not use this folder, or replace the link with the file.",
    )


def external_files(model: onnx.ModelProto) -> frozenset[str]:
    """Return every location that the tensors of a model refer to, in subgraphs and attributes too."""
    return frozenset(
        item.value
        for graph in graphs_in(model.graph)
        for tensor in tensors_of(graph)
        if is_external(tensor)
        for item in tensor.external_data
        if item.key == "location"
    )


def _check_tensors(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a model in which two tensors have the same name or share bytes of a file."""
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for graph in graphs_in(model.graph):
        check_names(graph, path)
        for tensor in filter(is_external, tensors_of(graph)):
            location, begin, end = _range(tensor, path)
            if begin < end:
                ranges.setdefault(location, []).append((begin, end, tensor.name))
    for location, places in ranges.items():
        for (_, end, one), (begin, _, other) in pairwise(sorted(places)):
            if begin < end:
                raise BundleError(f"{path}: tensors {one!r} and {other!r} overlap in {location!r}.", hint=_WRITE_AGAIN)


def _range(tensor: onnx.TensorProto, path: Path) -> tuple[str, int, int]:
    """Return the file of a tensor's data, its first byte and the byte after its last."""
    try:
        place = ExternalData.of(tensor)
        length = place.length
        if length is None:
            if len(tensor.dims) > _MOST_DIMENSIONS:  # the product of very many sizes alone takes minutes
                raise ValueError(f"{len(tensor.dims)} dimensions")
            length = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (ValueError, KeyError) as error:
        raise BundleError(f"{path}: external data of {tensor.name!r}: {error}.", hint=_WRITE_AGAIN) from error
    return posixpath.normpath(place.location), place.offset, place.offset + length


def _parts(graph: onnx.GraphProto) -> Iterator[int]:
    """Yield the number of parts of a graph and its subgraphs, adding one subgraph at a time."""
    count = 0
    for each in graphs_in(graph):
        count += len(each.node) + len(each.initializer) + len(each.value_info) + len(each.input) + len(each.output)
        yield count


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Yield every name in a model."""
    for opset in model.opset_import:
        yield opset.domain
    for graph in graphs_in(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)
        for tensor in tensors_of(graph):
            yield tensor.name
            yield from (text for item in tensor.external_data for text in (item.key, item.value))


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the tensors that a node and its subgraphs read, including those that the subgraphs make themselves."""
    yield from filter(None, node.input)
    for body in bodies_of([node]):
        yield from (value.name for value in body.output)
        for inner in body.node:
            yield from _reads(inner)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape: list[int | str] = []
    for number, size in enumerate(kind.shape.dim):
        known = size.HasField("dim_value") and size.dim_value > 0
        shape.append(size.dim_value if known else size.dim_param or f"size{number}")
    known = OF_ONNX.get(kind.elem_type)
    return TensorSpec(value.name, known.name if known else f"type{kind.elem_type}", tuple(shape))
