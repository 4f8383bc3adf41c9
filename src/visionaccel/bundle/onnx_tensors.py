"""Refuses ONNX models in which one tensor could stand for another: names given twice, external data that overlap."""

from __future__ import annotations

import math
import posixpath
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from visionaccel.core.external_data import ExternalData, is_external
from visionaccel.core.onnx_graphs import graphs_in, tensors_of
from visionaccel.errors import BundleError

if TYPE_CHECKING:
    import onnx

__all__ = ["check_tensor_names", "check_tensors"]

_AGAIN = "Export the model again."
_MOST_DIMENSIONS = 32


def check_tensors(model: onnx.ModelProto, where: object) -> None:
    """Refuse names that are given twice, and external data that overlap.

    Args:
        model: The model.
        where: What the error names it by.

    Raises:
        BundleError: If two tensors have one name, or share bytes of a file.
    """
    for graph in graphs_in(model.graph):
        check_tensor_names(graph, where)
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for graph in graphs_in(model.graph):
        for tensor in tensors_of(graph):
            if is_external(tensor):
                location, begin, end = _range(tensor, where)
                if begin < end:
                    ranges.setdefault(location, []).append((begin, end, tensor.name))
    for location, places in ranges.items():
        for (_, end, one), (begin, _, other) in pairwise(sorted(places)):
            if begin < end:
                raise BundleError(f"{where}: tensors {one!r} and {other!r} overlap in {location!r}.", hint=_AGAIN)


def check_tensor_names(graph: onnx.GraphProto, where: object) -> None:
    """Refuse a graph in which two weights, or a weight and what a node makes, have one name.

    Raises:
        BundleError: If so.
    """
    weights = Counter(tensor.name for tensor in graph.initializer)
    weights.update(tensor.values.name for tensor in graph.sparse_initializer)
    twice = next((name for name, count in weights.items() if count > 1), None)
    if twice is not None:
        raise BundleError(f"{where}: two weights are named {twice!r}.", hint=_AGAIN)
    made = Counter(name for node in graph.node for name in node.output if name)
    made.update(value.name for value in graph.input if value.name not in weights)
    twice = next((name for name, count in made.items() if count > 1 or name in weights), None)
    if twice is not None:
        raise BundleError(f"{where}: more than one input, weight or operator gives {twice!r}.", hint=_AGAIN)


def _range(tensor: onnx.TensorProto, where: object) -> tuple[str, int, int]:
    """The file of a tensor's data and which of its bytes they are."""
    try:
        place = ExternalData.of(tensor)
        length = _bytes(tensor) if place.length is None else place.length
    except (ValueError, KeyError) as error:
        raise BundleError(f"{where}: external data of {tensor.name!r}: {error}.", hint=_AGAIN) from error
    return posixpath.normpath(place.location), place.offset, place.offset + length


def _bytes(tensor: onnx.TensorProto) -> int:
    if len(tensor.dims) > _MOST_DIMENSIONS:  # the product of very many sizes alone takes minutes
        raise ValueError(f"{len(tensor.dims)} dimensions")
    items: int = math.prod(tensor.dims)
    from onnx import helper

    return items * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
