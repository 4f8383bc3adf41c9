"""Recognises the host's part of a tower that was exported, cut and compiled elsewhere.

transformers' tower is: patches, one product with the kernel of the patch embedding, the tokens gathered into window
order, blocks and merger, the embeddings gathered back. What lies between the gathers is the device's. The product may
be a convolution or a matrix product, and exporters scatter operators around that move nothing: reshapes, casts of
float32 to float32, identities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.tower_spec import Linear, TowerSpec
from visionaccel.errors import BundleError
from visionaccel_flexmlrt.vitisai.exported_operators import (
    PRODUCTS,
    STILL,
    UnknownHostError,
    check_gathers,
    is_plain,
    moved,
    named,
    product,
    squeezed,
)
from visionaccel_flexmlrt.vitisai.graph import OnnxGraph
from visionaccel_flexmlrt.vitisai.layout import Boundary

if TYPE_CHECKING:
    import onnx

_MOST_STEPS = 64
"""Operators of one chain; the host's part of a real export has about ten."""

_GATHER = frozenset({"Gather"})


@dataclass(frozen=True)
class HostPart:
    """The host's part of a compiled program, as it was found around the device's.

    Attributes:
        weights: The host's weights by their names below the checkpoint's prefix, float32, float16 or bfloat16.
        order: int64 [tokens]; the token that goes to each place, a permutation.
        input: What the device takes, by its own name.
        output: What the device gives, by its own name.
    """

    weights: Mapping[str, NDArray[Any]]
    order: NDArray[np.int64]
    input: TensorSpec
    output: TensorSpec


@dataclass(frozen=True)
class _Entry:
    """From the graph's input to the device: nodes, the embedding's weights, order, and the shape handed over."""

    nodes: tuple[int, ...]
    weights: Mapping[str, NDArray[Any]]
    order: NDArray[np.int64]
    shape: tuple[int, ...]


def recognise_host(spec: TowerSpec, graph: OnnxGraph, boundary: Boundary | None) -> HostPart:
    """The host's part around a device's, in the graph of a whole tower.

    Without a boundary, the device takes what comes out of the first gather, and gives what goes into the last.

    Raises:
        UnknownHostError: If the operators around the device's part are not the family's.
        BundleError: If the sizes are another tower's, an order is not a permutation, or the second gather does not undo
            the first.
    """
    if boundary is not None and (len(boundary.inputs) != 1 or len(boundary.outputs) != 1):
        raise UnknownHostError("the device takes or gives several tensors")
    if spec.window is None or len(spec.embed) > 1 or spec.positions is not None:
        raise UnknownHostError("host parts of towers without windows, or with learned positions, are not known")
    pixels, embeddings = _ends(spec, graph)
    if boundary is None:
        given, entry = _find_entry(spec, graph, pixels)
        taken = _find_taken(graph, embeddings.name)
    else:
        given, taken = boundary.inputs[0].name, boundary.outputs[0].name
        entry = _entry(spec, graph, pixels, _chain(graph, given, pixels.name))
    exit_nodes, reverse_index = _exit(spec, graph, embeddings, taken, len(entry.order))
    _check_cut(graph, pixels.name, given, taken, {*entry.nodes, *exit_nodes})
    _check_orders(entry.order, reverse_index)
    tokens = len(entry.order)
    return HostPart(
        weights=entry.weights,
        order=entry.order,
        input=TensorSpec(given, "float32", entry.shape),
        output=TensorSpec(taken, "float32", (tokens, spec.out_width)),
    )


def _ends(spec: TowerSpec, graph: OnnxGraph) -> tuple[TensorSpec, TensorSpec]:
    """The graph's only input and only output."""
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UnknownHostError(
            f"the graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, not one each"
        )
    pixels, embeddings = graph.inputs[0], graph.outputs[0]
    for tensor, width in ((pixels, spec.patch_width), (embeddings, spec.out_width)):
        if tensor.dtype != "float32":
            raise UnknownHostError(f"{tensor.name!r} is {tensor.dtype} and not float32")
        if tensor.shape and isinstance(tensor.shape[-1], int) and tensor.shape[-1] != width:
            raise BundleError(
                f"the model's {tensor} is of another width than the checkpoint's {width}.",
                hint="Pass the checkpoint that the artifact was compiled from.",
            )
    return pixels, embeddings


def _chain(graph: OnnxGraph, tensor: str, start: str) -> tuple[int, ...]:
    """The nodes from `start` to a tensor, each by its first input, if all of them may be the host's."""
    nodes: list[int] = []
    while tensor != start:
        place = graph.makers.get(tensor)
        if place is None or len(nodes) == _MOST_STEPS:
            raise UnknownHostError(f"{tensor!r} is not made from {start!r} by the host's operators")
        node = graph.nodes[place]
        if not is_plain(node, STILL | PRODUCTS | _GATHER):
            raise UnknownHostError(f"{named(node)} is not one of the host's operators")
        nodes.append(place)
        tensor = node.input[0]
    return tuple(reversed(nodes))


def _find_entry(spec: TowerSpec, graph: OnnxGraph, pixels: TensorSpec) -> tuple[str, _Entry]:
    """The first gather that patches reach embedded, and what comes out of it."""
    first: UnknownHostError | None = None
    for place in sorted(graph.descendants([pixels.name])):
        if graph.nodes[place].op_type != "Gather" or not graph.nodes[place].output:
            continue
        tensor = graph.nodes[place].output[0]
        try:
            return tensor, _entry(spec, graph, pixels, _chain(graph, tensor, pixels.name))
        except UnknownHostError as unknown:
            first = first or unknown
    raise first or UnknownHostError("no gather puts the tokens into window order")


def _entry(spec: TowerSpec, graph: OnnxGraph, pixels: TensorSpec, chain: Sequence[int]) -> _Entry:
    """Follow the shapes through the chain from the patches to the device."""
    gathers = [place for place in chain if graph.nodes[place].op_type == "Gather"]
    products = [place for place in chain if graph.nodes[place].op_type in PRODUCTS]
    if len(gathers) != 1 or len(products) != 1 or products[0] > gathers[0]:
        raise UnknownHostError("the patches are not embedded once and then gathered once")
    index = _index(graph, graph.nodes[gathers[0]])
    tokens, merged = len(index), spec.merged
    fed = (tokens * merged, spec.patch_width)
    if not pixels.fits(fed, {str(stated): size for stated, size in zip(pixels.shape, fed, strict=False)}):
        raise UnknownHostError(f"{tokens} tokens of {merged} patches are gathered from {pixels}")
    shape, weights = _follow(spec, graph, chain, fed, tokens)
    if squeezed(shape) != squeezed((tokens, merged, spec.hidden)):
        raise UnknownHostError(f"the device would take {list(shape)} for {tokens} tokens of {merged} patches")
    return _Entry(tuple(chain), weights, index, shape)


def _follow(
    spec: TowerSpec, graph: OnnxGraph, chain: Sequence[int], shape: tuple[int, ...], tokens: int
) -> tuple[tuple[int, ...], Mapping[str, NDArray[Any]]]:
    """The shape at the end of a chain, and the weights of the product in it."""
    weights: Mapping[str, NDArray[Any]] = {}
    for place in chain:
        node = graph.nodes[place]
        if node.op_type in PRODUCTS:
            kernel, bias, shape = product(graph, node, shape)
            weights = _embedding(spec, kernel, bias, named(node))
        elif node.op_type == "Gather":
            check_gathers(node, shape, tokens)
        else:
            shape = moved(graph, node, shape)
    return shape, weights


def _embedding(
    spec: TowerSpec, kernel: NDArray[Any], bias: NDArray[Any] | None, where: str
) -> Mapping[str, NDArray[Any]]:
    """The patch embedding's weights by their names, from the product that embeds patches."""
    (first,) = spec.embed
    assert isinstance(first, Linear), "TowerSpec checks it"
    expected = spec.hidden, spec.patch_width
    if kernel.shape != expected:
        raise BundleError(
            f"{where} embeds patches with a kernel of {list(kernel.shape)}, and the checkpoint's is {list(expected)}.",
            hint="Pass the checkpoint that the artifact was compiled from.",
        )
    found = {f"{first.name}.weight": kernel.reshape(spec.stored_shape(first))}
    if bias is not None and not first.bias:
        raise UnknownHostError(f"{where} adds a bias, and the tower has none")
    if first.bias:
        found[f"{first.name}.bias"] = np.zeros(spec.hidden, np.float32) if bias is None else bias
    return found


def _find_taken(graph: OnnxGraph, embeddings: str) -> str:
    """What goes into the last gather."""
    tensor = embeddings
    for _ in range(_MOST_STEPS):
        place = graph.makers.get(tensor)
        if place is None:
            break
        node = graph.nodes[place]
        if not is_plain(node, STILL | _GATHER):
            raise UnknownHostError(f"{named(node)} is not one of the host's operators")
        tensor = node.input[0]
        if node.op_type == "Gather":
            return str(tensor)
    raise UnknownHostError(f"{embeddings!r} is not gathered from what a device gives")


def _exit(
    spec: TowerSpec, graph: OnnxGraph, embeddings: TensorSpec, taken: str, tokens: int
) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """The nodes from what the device gives to the graph's output, and the order that they gather by."""
    chain = _chain(graph, embeddings.name, taken)
    gathers = [place for place in chain if graph.nodes[place].op_type == "Gather"]
    if len(gathers) != 1 or any(graph.nodes[place].op_type in PRODUCTS for place in chain):
        raise UnknownHostError("the embeddings are not gathered once and nothing else")
    index = _index(graph, graph.nodes[gathers[0]])
    shape, _ = _follow(spec, graph, chain, (tokens, spec.out_width), tokens)
    if squeezed(shape) != squeezed((tokens, spec.out_width)):
        raise UnknownHostError(f"the embeddings come out as {list(shape)}")
    return chain, index


def _index(graph: OnnxGraph, node: onnx.NodeProto) -> NDArray[np.int64]:
    index = graph.constant(node.input[1]) if len(node.input) == 2 else None
    if index is None or index.dtype.name not in ("int32", "int64") or index.ndim != 1 or not len(index):
        raise UnknownHostError(f"{named(node)} does not gather by a constant index")
    return index.astype(np.int64)


def _check_orders(window_index: NDArray[np.int64], reverse_index: NDArray[np.int64]) -> None:
    tokens = len(window_index)
    if not np.array_equal(np.sort(window_index), np.arange(tokens)):
        raise BundleError(
            f"the model's window order of {tokens} tokens is not a permutation: tokens are lost or repeated.",
            hint="Export and compile the tower again.",
        )
    expected = np.argsort(window_index)
    if not np.array_equal(reverse_index, expected):
        wrong = int((reverse_index != expected).sum()) if len(reverse_index) == tokens else max(tokens, 1)
        raise BundleError(
            f"the model does not put its embeddings back: {wrong} of {tokens} places of the reverse order are not the "
            "inverse of the window order.",
            hint="Export and compile the tower again.",
        )


def _check_cut(graph: OnnxGraph, pixels: str, given: str, taken: str, host: set[int]) -> None:
    """Whether the device's part touches the rest of the graph in these two tensors only."""
    ends = [tensor.name for tensor in graph.outputs]
    needed, fed = graph.ancestors(ends), graph.descendants([pixels])
    for place in sorted(graph.descendants([pixels], [given]) & needed - host):
        raise UnknownHostError(f"{named(graph.nodes[place])} takes from the patches and is not the device's")
    for place in sorted(graph.ancestors(ends, [taken]) & fed - host):
        raise UnknownHostError(f"{named(graph.nodes[place])} gives to the embeddings and is not the device's")
    if graph.makers.get(taken) not in graph.descendants([given]):
        raise UnknownHostError(f"{taken!r} does not depend on {given!r}")


def end_operators(graph: OnnxGraph) -> list[int]:
    """The operators at the graph's ends, up to the first that is not the host's: where the device's are not known."""
    before: list[int] = []
    for place in sorted(graph.descendants(tensor.name for tensor in graph.inputs)):
        before.append(place)
        if not is_plain(graph.nodes[place], STILL | PRODUCTS):
            break
    after: list[int] = []
    tensor = graph.outputs[0].name if graph.outputs else ""
    while (last := graph.makers.get(tensor)) is not None and len(after) < _MOST_STEPS:
        after.append(last)
        if not is_plain(graph.nodes[last], STILL):
            break
        tensor = graph.nodes[last].input[0]
    return [*before, *(place for place in reversed(after) if place not in before)]
