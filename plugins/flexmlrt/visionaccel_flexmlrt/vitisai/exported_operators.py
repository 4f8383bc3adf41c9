"""The operators that exporters put on the host's side of a tower: their shapes, and whether they move elements."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.errors import BundleError
from visionaccel_flexmlrt.vitisai.graph import OnnxGraph, given_inputs

if TYPE_CHECKING:
    import onnx

STILL = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast", "Transpose"})
"""Operators that move no elements with suitable attributes; `moved` checks those."""

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})

_FLOAT32 = 1
_MOST_AXES = 16


class UnknownHostError(Exception):
    """The host's part of a graph is not recognised; the message says where."""


def is_plain(node: onnx.NodeProto, kinds: frozenset[str]) -> bool:
    """Whether a node is a standard operator of these kinds."""
    return node.op_type in kinds and node.domain in ("", "ai.onnx") and bool(node.input) and bool(node.output)


def named(node: onnx.NodeProto) -> str:
    """A node in a message."""
    return f"{node.op_type} {node.name!r}"


def product(
    graph: OnnxGraph, node: onnx.NodeProto, shape: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[Any] | None, tuple[int, ...]]:
    """The matrix [outputs, inputs] that a product multiplies rows by, its bias, and the shape of its output.

    The node is a `Conv` whose kernel covers its whole input, a `Gemm` or a `MatMul`, of an input of this shape.
    UnknownHostError if it does anything else.
    """
    weight = graph.constant(node.input[1]) if len(node.input) > 1 else None
    if weight is None or weight.ndim < 2 or weight.dtype.name not in ("float32", "float16", "bfloat16"):
        raise UnknownHostError(f"{named(node)} does not multiply by a constant kernel")
    bias: NDArray[Any] | None = None
    if len(node.input) > 2 and node.input[2]:
        bias = graph.constant(node.input[2])
        if bias is None:
            raise UnknownHostError(f"{named(node)} adds a bias that is not constant")
        bias = bias if bias.astype(np.float32).any() else None
    if node.op_type == "Conv":
        matrix = weight.reshape(len(weight), -1)
        plain = (
            len(shape) == weight.ndim
            and shape[1:] == weight.shape[1:]
            and _integer(node, "group", 1) == 1
            and not any(_integers(node, "pads") or ())
            and set(_integers(node, "dilations") or (1,)) <= {1}
            and (_integers(node, "kernel_shape") or weight.shape[2:]) == weight.shape[2:]
            and all(a.s in (b"NOTSET", b"VALID") for a in node.attribute if a.name == "auto_pad")
        )
        result: tuple[int, ...] = (shape[0], len(weight), *(1,) * (len(shape) - 2))
    else:
        matrix = weight if node.op_type == "Gemm" and _integer(node, "transB", 0) == 1 else weight.T
        plain = (
            weight.ndim == 2
            and matrix.shape[1] == shape[-1]
            and (node.op_type == "MatMul" or len(shape) == 2)
            and _integer(node, "transA", 0) == 0
            and all(a.f == 1.0 for a in node.attribute if a.name in ("alpha", "beta"))
        )
        result = (*shape[:-1], len(matrix))
    if not plain:
        raise UnknownHostError(f"{named(node)} is not a product of {list(shape)} with the kernel")
    if bias is None:
        return matrix, None, result
    if bias.shape[-1:] != (len(matrix),) or bias.size != len(matrix):
        raise UnknownHostError(f"{named(node)} adds a bias of {list(bias.shape)} to rows of {len(matrix)}")
    return matrix, bias.reshape(-1), result


def check_gathers(node: onnx.NodeProto, shape: tuple[int, ...], tokens: int) -> None:
    """Refuse a gather of anything but whole tokens, on the first axis that is not of size 1."""
    axis = _integer(node, "axis", 0)
    if not -len(shape) <= axis < len(shape) or shape[axis] != tokens or math.prod(shape[: axis % len(shape)]) != 1:
        raise UnknownHostError(f"{named(node)} does not gather {tokens} tokens of {list(shape)}")


def moved(graph: OnnxGraph, node: onnx.NodeProto, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape after an operator of `STILL`; UnknownHostError if it moves elements or does not return float32."""
    result: tuple[int, ...] | None
    if node.op_type in ("Identity", "Cast"):  # `_shape_after` would copy the elements
        result = shape if node.op_type == "Identity" or _integer(node, "to", 0) == _FLOAT32 else None
    else:
        result = _shape_after(graph, node, shape)
    if node.op_type == "Transpose":
        order = _integers(node, "perm") or tuple(range(len(shape)))[::-1]
        real = [axis for axis in order if 0 <= axis < len(shape) and shape[axis] != 1]
        result = result if real == sorted(real) else None
    if result is None or math.prod(result) != math.prod(shape) or min(result, default=1) < 1:
        raise UnknownHostError(f"{named(node)} does more to {list(shape)} than to reshape it")
    return result


def _shape_after(graph: OnnxGraph, node: onnx.NodeProto, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of an operator's output, computed on an array that takes no memory; None if the operator fails."""
    given: list[NDArray[Any]] = [np.broadcast_to(np.float32(0), shape)]
    for name in given_inputs(node)[1:]:
        values = graph.constant(name)
        if values is None or values.dtype.kind != "i" or values.ndim > 1 or values.size > _MOST_AXES:
            raise UnknownHostError(f"{named(node)} has a shape that is not constant")
        given.append(values)
    for attribute in node.attribute:
        if len(attribute.ints) > _MOST_AXES:
            raise UnknownHostError(f"{named(node)} has {len(attribute.ints)} {attribute.name}")
    try:
        return graph.evaluate(node, given).shape
    except BundleError:
        return None


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _integers(node: onnx.NodeProto, name: str) -> tuple[int, ...] | None:
    found = next((a.ints for a in node.attribute if a.name == name), None)
    if found is not None and len(found) > _MOST_AXES:
        raise UnknownHostError(f"{named(node)} has {len(found)} {name}")
    return None if found is None else tuple(found)
