"""Recognises the host's part of a tower that was exported, cut and compiled elsewhere.

In transformers' tower the patches are multiplied by the patch embedding's kernel, the tokens are gathered into window
order, pass through the blocks and the merger, and are gathered back. The device runs what is between the two gathers.
The product may be a convolution or a matrix product, and exporters add operators that move nothing: reshapes, casts of
float32 to float32, identities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.tower_spec import Linear, TowerSpec
from visionaccel.errors import BundleError
from visionaccel_flexmlrt.vitisai.graph import EXPORT_AGAIN, OTHER_CHECKPOINT, OnnxGraph, given_inputs, squeezed
from visionaccel_flexmlrt.vitisai.layout import Boundary

if TYPE_CHECKING:
    import onnx

_STILL = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast", "Transpose"})
"""Operators that move no elements with suitable attributes; `moved` checks those."""

_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})

_FLOAT32 = 1
_MOST_AXES = 16
_MOST_STEPS = 64
"""The most operators of one chain; the host's part of a real export has about ten."""

_GATHER = frozenset({"Gather"})


class UnknownHostError(Exception):
    """The host's part of a graph is not recognised; the message says where."""


@dataclass(frozen=True)
class HostPart:
    """The host's part of a compiled program, as found around the device's part.

    Attributes:
        weights: The host's weights by their names below the checkpoint's prefix, float32, float16 or bfloat16.
        order: int64 [tokens], a permutation: the token at each place in window order.
        input: The device's input, by its name in the model.
        output: The device's output, by its name in the model.
    """

    weights: Mapping[str, NDArray[Any]]
    order: NDArray[np.int64]
    input: TensorSpec
    output: TensorSpec


@dataclass(frozen=True)
class _Entry:
    """The nodes from the graph's input to the device, and what they show."""

    nodes: tuple[int, ...]
    weights: Mapping[str, NDArray[Any]]
    order: NDArray[np.int64]
    input: TensorSpec


def recognise_host(spec: TowerSpec, graph: OnnxGraph, boundary: Boundary | None) -> HostPart:
    """Find the host's part around the device's part in the graph of a whole tower.

    Without a boundary, the device takes the output of the first gather and returns the input of the last.

    Raises:
        UnknownHostError: If the operators around the device's part are not the family's.
        BundleError: If the sizes are those of a different tower, an order is not a permutation, or the second gather
            does not undo the first.
    """
    if boundary is not None and (len(boundary.inputs) != 1 or len(boundary.outputs) != 1):
        raise UnknownHostError("the device takes or returns several tensors")
    if spec.window is None or len(spec.embed) > 1 or spec.positions is not None:
        raise UnknownHostError("host parts of towers without windows, or with learned positions, are not supported")
    pixels, embeddings = _ends(spec, graph)
    if boundary is None:
        entry, taken = _find_entry(spec, graph, pixels), None
    else:
        entry, taken = _entry(spec, graph, pixels, boundary.inputs[0].name), boundary.outputs[0].name
    tokens = len(entry.order)
    output = TensorSpec(embeddings.name, "float32", (tokens, spec.out_width))
    exit_nodes = _chain(graph, output.name, taken, _STILL | _GATHER)
    if taken is None:
        taken = graph.nodes[exit_nodes[0]].input[0]
    reverse_order = _gather_index(graph, exit_nodes)
    shape, _ = _follow(spec, graph, exit_nodes, (tokens, spec.out_width), tokens)
    if squeezed(shape) != squeezed((tokens, spec.out_width)):
        raise UnknownHostError(f"the embeddings have shape {list(shape)}")
    _check_cut(graph, pixels.name, entry.input.name, taken, {*entry.nodes, *exit_nodes})
    _check_orders(entry.order, reverse_order)
    return HostPart(entry.weights, entry.order, entry.input, replace(output, name=taken))


def _ends(spec: TowerSpec, graph: OnnxGraph) -> tuple[TensorSpec, TensorSpec]:
    """Return the graph's only input and only output."""
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UnknownHostError(
            f"the graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, not one each"
        )
    pixels, embeddings = graph.inputs[0], graph.outputs[0]
    for tensor, width in ((pixels, spec.patch_width), (embeddings, spec.out_width)):
        if tensor.dtype != "float32":
            raise UnknownHostError(f"{tensor.name!r} is {tensor.dtype} and not float32")
        if tensor.shape and isinstance(tensor.shape[-1], int) and tensor.shape[-1] != width:
            raise BundleError(f"the model has {tensor}, but the checkpoint's width is {width}.", hint=OTHER_CHECKPOINT)
    return pixels, embeddings


def _chain(graph: OnnxGraph, tensor: str, start: str | None, kinds: frozenset[str]) -> tuple[int, ...]:
    """Return the nodes that make a tensor from `start`, or from the input of the last gather if `start` is None.

    Only each node's first input is followed. All nodes must be standard operators of these kinds.
    """
    nodes: list[int] = []
    while tensor != start:
        place = graph.makers.get(tensor)
        if place is None or len(nodes) == _MOST_STEPS:
            origin = "a gather of what the device returns" if start is None else repr(start)
            raise UnknownHostError(f"{tensor!r} is not made from {origin} by the host's operators")
        node = graph.nodes[place]
        if not _is_plain(node, kinds):
            raise UnknownHostError(f"{named(node)} is not one of the host's operators")
        nodes.append(place)
        if start is None and node.op_type == "Gather":
            break
        tensor = node.input[0]
    return tuple(reversed(nodes))


def _find_entry(spec: TowerSpec, graph: OnnxGraph, pixels: TensorSpec) -> _Entry:
    """Return the entry that ends with the first gather of embedded patches."""
    first: UnknownHostError | None = None
    for place in sorted(graph.descendants([pixels.name])):
        node = graph.nodes[place]
        if node.op_type == "Gather" and node.output:
            try:
                return _entry(spec, graph, pixels, node.output[0])
            except UnknownHostError as unknown:
                first = first or unknown
    raise first or UnknownHostError("no gather puts the tokens into window order")


def _entry(spec: TowerSpec, graph: OnnxGraph, pixels: TensorSpec, given: str) -> _Entry:
    """Return the nodes from the patches to the device's input, with the shapes followed through them."""
    chain = _chain(graph, given, pixels.name, _STILL | _PRODUCTS | _GATHER)
    kinds = [kind for kind in (graph.nodes[place].op_type for place in chain) if kind not in _STILL]
    if len(kinds) != 2 or kinds[0] not in _PRODUCTS:
        raise UnknownHostError("the patches are not embedded once and then gathered once")
    order = _gather_index(graph, chain)
    tokens, merged = len(order), spec.merged
    patches = (tokens * merged, spec.patch_width)
    if not pixels.fits(patches, {str(size): known for size, known in zip(pixels.shape, patches, strict=False)}):
        raise UnknownHostError(f"{tokens} tokens of {merged} patches are gathered from {pixels}")
    shape, weights = _follow(spec, graph, chain, patches, tokens)
    if squeezed(shape) != squeezed((tokens, merged, spec.hidden)):
        raise UnknownHostError(f"the device would take {list(shape)} for {tokens} tokens of {merged} patches")
    return _Entry(chain, weights, order, TensorSpec(given, "float32", shape))


def _gather_index(graph: OnnxGraph, chain: Sequence[int]) -> NDArray[np.int64]:
    """Return the constant index of the only gather in a chain."""
    gathers = [graph.nodes[place] for place in chain if graph.nodes[place].op_type == "Gather"]
    if len(gathers) != 1:
        raise UnknownHostError(f"tokens are gathered {len(gathers)} times, not once")
    index = graph.constant(gathers[0].input[1]) if len(gathers[0].input) == 2 else None
    if index is None or index.dtype.name not in ("int32", "int64") or index.ndim != 1 or not len(index):
        raise UnknownHostError(f"{named(gathers[0])} does not gather by a constant index")
    return index.astype(np.int64)


def _follow(
    spec: TowerSpec, graph: OnnxGraph, chain: Sequence[int], shape: tuple[int, ...], tokens: int
) -> tuple[tuple[int, ...], Mapping[str, NDArray[Any]]]:
    """Return the shape at the end of a chain, and the weights of the product in it."""
    weights: Mapping[str, NDArray[Any]] = {}
    for place in chain:
        node = graph.nodes[place]
        if node.op_type in _PRODUCTS:
            kernel, bias, shape = _product(graph, node, shape)
            weights = _embedding(spec, kernel, bias, named(node))
        elif node.op_type == "Gather":
            _check_gathers(node, shape, tokens)
        else:
            shape = moved(graph, node, shape)
    return shape, weights


def _embedding(
    spec: TowerSpec, kernel: NDArray[Any], bias: NDArray[Any] | None, where: str
) -> Mapping[str, NDArray[Any]]:
    """Return the patch embedding's weights by name."""
    (first,) = spec.embed
    assert isinstance(first, Linear), "TowerSpec checks it"
    expected = spec.hidden, spec.patch_width
    if kernel.shape != expected:
        raise BundleError(
            f"{where} embeds patches with a kernel of {list(kernel.shape)}, but the checkpoint's is {list(expected)}.",
            hint=OTHER_CHECKPOINT,
        )
    found = {f"{first.name}.weight": kernel.reshape(spec.stored_shape(first))}
    if bias is not None and not first.bias:
        raise UnknownHostError(f"{where} adds a bias, and the tower has none")
    if first.bias:
        found[f"{first.name}.bias"] = np.zeros(spec.hidden, np.float32) if bias is None else bias
    return found


def _check_orders(window_order: NDArray[np.int64], reverse_order: NDArray[np.int64]) -> None:
    tokens = len(window_order)
    if not np.array_equal(np.sort(window_order), np.arange(tokens)):
        raise BundleError(
            f"the model's window order of {tokens} tokens is not a permutation: tokens are lost or repeated.",
            hint=EXPORT_AGAIN,
        )
    inverse = np.argsort(window_order)
    if not np.array_equal(reverse_order, inverse):
        wrong = int((reverse_order != inverse).sum()) if len(reverse_order) == tokens else max(tokens, 1)
        raise BundleError(
            f"the model does not restore the order of its embeddings: {wrong} of {tokens} entries of the reverse order "
            "are not the inverse of the window order.",
            hint=EXPORT_AGAIN,
        )


def _check_cut(graph: OnnxGraph, pixels: str, given: str, taken: str, host: set[int]) -> None:
    """Refuse a device part that is connected to the rest of the graph by more than these two tensors."""
    ends = [tensor.name for tensor in graph.outputs]
    needed, fed = graph.ancestors(ends), graph.descendants([pixels])
    for place in sorted(graph.descendants([pixels], [given]) & needed - host):
        raise UnknownHostError(f"{named(graph.nodes[place])} reads the patches and is not in the device's part")
    for place in sorted(graph.ancestors(ends, [taken]) & fed - host):
        raise UnknownHostError(f"{named(graph.nodes[place])} feeds the embeddings and is not in the device's part")
    if graph.makers.get(taken) not in graph.descendants([given]):
        raise UnknownHostError(f"{taken!r} does not depend on {given!r}")


def end_operators(graph: OnnxGraph) -> list[int]:
    """Return the operators at a graph's ends, up to the first that cannot be the host's, if no boundary is known."""
    before: list[int] = []
    for place in sorted(graph.descendants(tensor.name for tensor in graph.inputs)):
        before.append(place)
        if not _is_plain(graph.nodes[place], _STILL | _PRODUCTS):
            break
    after: list[int] = []
    tensor = graph.outputs[0].name if graph.outputs else ""
    while (last := graph.makers.get(tensor)) is not None and len(after) < _MOST_STEPS:
        after.append(last)
        if not _is_plain(graph.nodes[last], _STILL):
            break
        tensor = graph.nodes[last].input[0]
    return [*before, *(place for place in reversed(after) if place not in before)]


def _is_plain(node: onnx.NodeProto, kinds: frozenset[str]) -> bool:
    """Return whether a node is a standard operator of these kinds."""
    return node.op_type in kinds and node.domain in ("", "ai.onnx") and bool(node.input) and bool(node.output)


def named(node: onnx.NodeProto) -> str:
    """Return how messages name a node."""
    return f"{node.op_type} {node.name!r}"


def _product(
    graph: OnnxGraph, node: onnx.NodeProto, shape: tuple[int, ...]
) -> tuple[NDArray[Any], NDArray[Any] | None, tuple[int, ...]]:
    """Return the matrix [outputs, inputs] that a product multiplies rows by, its bias, and the shape of its output.

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


def _check_gathers(node: onnx.NodeProto, shape: tuple[int, ...], tokens: int) -> None:
    """Refuse a gather of anything but whole tokens, on the first axis that is not of size 1."""
    axis = _integer(node, "axis", 0)
    if not -len(shape) <= axis < len(shape) or shape[axis] != tokens or math.prod(shape[: axis % len(shape)]) != 1:
        raise UnknownHostError(f"{named(node)} does not gather {tokens} tokens of {list(shape)}")


def moved(graph: OnnxGraph, node: onnx.NodeProto, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape after an operator of `_STILL`; UnknownHostError if it moves elements or is not float32."""
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
    """Return the shape of an operator's output, from an array that takes no memory; None if the operator fails."""
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
