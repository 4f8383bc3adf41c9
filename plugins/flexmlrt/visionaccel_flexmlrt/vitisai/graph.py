"""An ONNX graph as a foreign file holds it: who makes what from what, and the few constants that are asked for.

Weights stay where they are. External data are read tensor by tensor, from plain names in the model's own folder.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from visionaccel.bundle import check_tensors
from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.dtypes import DTYPES, OF_ONNX
from visionaccel.core.onnx_graphs import ExternalData, bodies_of, graphs_in, is_external, tensors_of
from visionaccel.errors import BundleError

_AGAIN = "Fetch the folder again, or export and compile the tower again."
_MOST_MODEL_BYTES = 2**31
"""Protobuf's own limit."""

_MOST_PARTS = 200_000
"""The tower of the 72B model has some thousands, and looking at each takes microseconds."""

_MOST_CONSTANT_BYTES = 2**28
"""Of one constant on the host's side; a patch embedding has 6 MB."""

_MOST_DIMENSIONS = 32
_MOST_FOLDS = 64
"""Operators that one constant is made by, all of them counted: a graph may hand each on to the next one twice."""

_HOSTS = ("float32", "float16", "bfloat16", "int32", "int64")
_TYPES: Mapping[int, np.dtype[Any]] = {DTYPES[name].onnx: DTYPES[name].numpy for name in _HOSTS}
"""Dtypes that a host part has."""

_CONSTANTS = {
    "value_int": ("i", np.int64, onnx.AttributeProto.INT),
    "value_ints": ("ints", np.int64, onnx.AttributeProto.INTS),
    "value_float": ("f", np.float32, onnx.AttributeProto.FLOAT),
    "value_floats": ("floats", np.float32, onnx.AttributeProto.FLOATS),
    "value": ("t", None, onnx.AttributeProto.TENSOR),
}
"""Attributes of a `Constant` that hold numbers or a tensor: the field with the value, its dtype and its type."""


class OnnxGraph:
    """A model's main graph; nodes are named by their places in it.

    The model is not changed. External data lie in the folder of its path.

    Attributes:
        weights: Stored tensors by their names.
        makers: The node that makes each other tensor but the graph's inputs.

    Raises:
        BundleError: If two tensors have one name, or share bytes of a file.
    """

    def __init__(self, model: onnx.ModelProto, path: Path) -> None:
        self.model, self.path = model, path
        check_tensors(model, path)
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
        """Read a model without its external data.

        Raises:
            BundleError: If it cannot be read or is not an ONNX model.
        """
        try:
            model = onnx.load_model_from_string(read_bounded(path, _MOST_MODEL_BYTES - 1))
        except Exception as error:  # protobuf's decoding error is not part of its public interface
            raise BundleError(f"{path} is not an ONNX model: {error}", hint=_AGAIN) from error
        if any(count > _MOST_PARTS for count in _parts(model.graph)):
            raise BundleError(f"{path} has more than {_MOST_PARTS} operators, weights and tensors.", hint=_AGAIN)
        # Protobuf gives bytes where a text is not UTF-8.
        if any(isinstance(text, bytes) for text in _texts(model)):
            raise BundleError(f"{path} holds names that are not text.", hint=_AGAIN)
        if not model.graph.node:
            raise BundleError(f"{path} holds no operators.", hint=_AGAIN)
        return cls(model, path)

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What is fed; unknown sizes are names."""
        return tuple(_spec(value) for value in self.model.graph.input if value.name not in self.weights)

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What comes out; unknown sizes are names."""
        return tuple(_spec(value) for value in self.model.graph.output)

    @cached_property
    def declared(self) -> Mapping[str, TensorSpec]:
        """What the model declares of tensors."""
        graph = self.model.graph
        return {value.name: _spec(value) for value in (*graph.value_info, *graph.output, *graph.input)}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.makers or tensor in self.declared or tensor in self.weights

    def ancestors(self, tensors: Iterable[str], cut: Iterable[str] = ()) -> frozenset[int]:
        """Nodes that tensors depend on, not looking behind those of `cut`."""

        def before(tensor: str) -> list[int]:
            return [self.makers[tensor]] if tensor in self.makers else []

        return _reached(tensors, cut, before, lambda place: _reads(self.nodes[place]))

    def descendants(self, tensors: Iterable[str], cut: Iterable[str] = ()) -> frozenset[int]:
        """Nodes that depend on tensors, not looking behind those of `cut`."""

        def after(tensor: str) -> list[int]:
            return self._readers.get(tensor, [])

        return _reached(tensors, cut, after, lambda place: filter(None, self.nodes[place].output))

    def reads(self, places: Iterable[int]) -> frozenset[str]:
        """Every tensor that these nodes read, within their subgraphs too."""
        return frozenset(name for place in places for name in _reads(self.nodes[place]))

    def values(self, tensor: onnx.TensorProto) -> NDArray[Any] | None:
        """The values of a stored tensor; None for a dtype that no host part has.

        Raises:
            BundleError: If its data are damaged, missing or elsewhere.
        """
        dtype = _TYPES.get(tensor.data_type)
        if dtype is None:
            return None
        where = f"{self.path}: tensor {tensor.name!r}"
        if len(tensor.dims) > _MOST_DIMENSIONS:  # the product of very many sizes alone takes minutes
            raise BundleError(f"{where} has {len(tensor.dims)} dimensions.", hint=_AGAIN)
        shape = tuple(tensor.dims)
        items = math.prod(shape)
        if min(shape, default=1) < 0 or items * dtype.itemsize > _MOST_CONSTANT_BYTES:
            raise BundleError(f"{where} has the impossible shape {list(shape)}.", hint=_AGAIN)
        try:
            if not is_external(tensor):
                return numpy_helper.to_array(tensor)
            return self._external(tensor, dtype, items, where).reshape(shape)
        except (ValueError, TypeError, OverflowError, OSError) as error:
            raise BundleError(f"{where} cannot be read: {error}", hint=_AGAIN) from error

    def _external(self, tensor: onnx.TensorProto, dtype: np.dtype[Any], items: int, where: str) -> NDArray[Any]:
        place = ExternalData.of(tensor)
        file = plain_file(self.path.parent, place.location, where)
        wanted = items * dtype.itemsize
        length = wanted if place.length is None else place.length
        if length != wanted or place.offset + length > file.stat().st_size:
            raise BundleError(f"{where} lies outside of {file.name} or has another size.", hint=_AGAIN)
        return np.fromfile(file, dtype, items, offset=place.offset)

    def constant(self, tensor: str, folds: Iterator[int] | None = None) -> NDArray[Any] | None:
        """The values of a tensor that depends on no input and is simply made; None for any other.

        `folds` has an item for each operator that may still be computed; by default for a few.

        Raises:
            BundleError: If its data are damaged, missing or elsewhere.
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
            values = self.constant(name, folds)
            if values is None:
                return None
            given.append(values)
        found = self.evaluate(node, given)
        return found if found.dtype in _TYPES.values() else None

    def evaluate(self, node: onnx.NodeProto, given: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """What a standard operator of one output makes of its `given_inputs`, in the model's version of the operator.

        Raises:
            BundleError: If it is malformed.
        """
        latest = onnx.defs.onnx_opset_version()
        stated = [each.version for each in self.model.opset_import if each.domain in ("", "ai.onnx")]
        alone = onnx.NodeProto()
        alone.CopyFrom(node)
        alone.domain = ""
        names = given_inputs(node)
        del alone.input[len(names) :]
        fed = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names)]
        try:
            graph = helper.make_graph([alone], "alone", fed, [onnx.ValueInfoProto(name=node.output[0])])
            evaluator = ReferenceEvaluator(graph, opsets={"": min([latest, *stated])})
            with np.errstate(all="ignore"):
                (found,) = evaluator.run(None, dict(zip(names, given, strict=True)))
        except Exception as error:  # an operator may fail in any way on what it does not take
            where = f"{self.path}: {node.op_type} {node.name!r}"
            raise BundleError(f"{where} is malformed: {error}", hint=_AGAIN) from error
        return np.asarray(found)

    def _of_constant(self, node: onnx.NodeProto) -> NDArray[Any] | None:
        for attribute in node.attribute:
            if attribute.name not in _CONSTANTS:
                continue
            field, dtype, kind = _CONSTANTS[attribute.name]
            # Some writers state no type.
            if attribute.ref_attr_name or attribute.type not in (kind, onnx.AttributeProto.UNDEFINED):
                where = f"{self.path}: Constant {node.name!r}"
                raise BundleError(f"{where} is malformed: its {attribute.name} has another type.", hint=_AGAIN)
            value = getattr(attribute, field)
            return self.values(value) if dtype is None else np.array(value, dtype)
        return None


def _reached(
    tensors: Iterable[str],
    cut: Iterable[str],
    nodes_at: Callable[[str], Iterable[int]],
    tensors_at: Callable[[int], Iterable[str]],
) -> frozenset[int]:
    """Nodes that are reached from tensors, not beyond those of `cut`."""
    found: set[int] = set()
    ends = set(cut)
    ahead = [name for name in tensors if name not in ends]
    while ahead:
        for place in nodes_at(ahead.pop()):
            if place not in found:
                found.add(place)
                ahead += [name for name in tensors_at(place) if name not in ends]
    return frozenset(found)


def given_inputs(node: onnx.NodeProto) -> list[str]:
    """A node's inputs without the optional ones at the end that are left empty."""
    names = list(node.input)
    while names and not names[-1]:
        names.pop()
    return names


def plain_file(folder: Path, name: str, where: str) -> Path:
    """A file that something in `folder` names, if it is a plain name of a file there.

    Raises:
        BundleError: If it leads elsewhere, or is not there.
    """
    if not name or name != Path(name).name or name in (".", "..") or any(c in name for c in "\\/:\0"):
        raise BundleError(
            f"{where} refers to {name[:200]!r}, which is not a plain file name in the same folder.",
            hint="Do not use this folder, or put all files side by side and compile again.",
        )
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{where} refers to {path}, which is not there.", hint="Fetch the missing file.")
    check_link(path, folder)
    return path


def check_link(file: Path, folder: Path) -> None:
    """Refuse a file that lies outside of a folder, links followed.

    In a Hugging Face cache, `<repository>/snapshots/<revision>` holds links to `<repository>/blobs`; those are taken.

    Raises:
        BundleError: If it lies elsewhere.
    """
    real = Path(os.path.realpath(file))
    if real.is_relative_to(os.path.realpath(folder)):
        return
    link = Path(os.path.realpath(file.parent), file.name)
    for place, name in enumerate(link.parts[:-2]):
        if name == "snapshots" and real.is_relative_to(Path(*link.parts[:place], "blobs")):
            return
    raise BundleError(
        f"{file} leads to {real}, outside of {folder}.",
        hint="Do not use this folder, or put the file itself in the place of the link.",
    )


def external_files(model: onnx.ModelProto) -> frozenset[str]:
    """Every location that the tensors of a model name, in subgraphs and attributes too."""
    return frozenset(
        item.value
        for graph in graphs_in(model.graph)
        for tensor in tensors_of(graph)
        if is_external(tensor)
        for item in tensor.external_data
        if item.key == "location"
    )


def _parts(graph: onnx.GraphProto) -> Iterator[int]:
    """How much there is in a graph and in those within, added up as they are looked at."""
    count = 0
    for each in graphs_in(graph):
        count += len(each.node) + len(each.initializer) + len(each.value_info) + len(each.input) + len(each.output)
        yield count


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Every name in a model."""
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
    """What a node reads; names within its subgraphs count, whether they are theirs or from around."""
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
