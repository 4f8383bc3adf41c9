"""Replaces matrix products with a tower's weights in an ONNX model by int8 products.

A channel or row with much larger values than the others would leave them few of the 256 steps. So each channel of the
rows is divided by a factor, and the weight is multiplied by it (SmoothQuant, https://arxiv.org/abs/2211.10438). Then
each row is divided by its largest value, and its result is multiplied by that value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionaccel.backends.onnx_weights import parse_onnx
from visionaccel.core.program import Program
from visionaccel.errors import ArtifactError, ConfigurationError

Nodes: TypeAlias = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]
"""Nodes and the constants that they read."""

_SMOOTHING = 0.5
"""Exponent of the activations in the smoothing factors: the paper's value for most models."""

_SAME = frozenset({"Cast", "Identity"})
"""Operators that change at most a value's dtype."""


@dataclass(frozen=True)
class Product:
    """A product of rows with a stored weight [outputs, channels].

    Attributes:
        node: A `Gemm` with `transB`; its third input, if it has one, is the bias.
        weight: The weight's name in the tower.
    """

    node: onnx.NodeProto
    weight: str


def quantize_products(
    program: Program,
    path: Path,
    run: Callable[[onnx.ModelProto, list[str]], Iterable[Sequence[NDArray[np.float32]]]],
    multiply: Callable[[Product, str, NDArray[np.float32], str], Nodes],
    *,
    least: float,
    keep_last: bool = False,
) -> None:
    """Write a program whose products are int8, except the small product that embeds the patches.

    Args:
        program: A float32 ONNX program; the result refers to its weights that are not quantized.
        path: The file to write.
        run: Runs a float32 model that uses the program's weights on the calibration inputs. Takes the model and names
            of some of its outputs; yields these outputs for each call.
        multiply: Makes the nodes of an int8 product from: the product, the name of its rows [rows, channels], whose
            values are between -1 and 1, the weight float32 [outputs, channels], and the name for the result
            [rows, outputs].
        least: Divisor of a row of zeros.
        keep_last: Do not quantize the model's last product, if there are others.

    Raises:
        ConfigurationError: If the model has no products to quantize, or no calls are given.
        ArtifactError: If the model cannot be read, or the rows are not finite.
    """
    model = parse_model(program)
    groups = _find_products(model, program)
    if keep_last and len(groups) > 1:
        groups.popitem()
    largest = _largest_by_channel(list(groups), run(*_add_largest(model, list(groups))))
    replaced: dict[str, list[onnx.NodeProto]] = {}
    initializers: list[onnx.TensorProto] = []
    for number, (rows, group) in enumerate(groups.items()):
        name = f"smooth.{number}"
        weights = [program.weights[product.weight].read().astype(np.float32) for product in group]
        factors = _smoothing_factors(largest[rows], weights)
        even, constants = _even_rows(model, rows, factors, name, least)
        initializers += constants
        for product, weight in zip(group, weights, strict=True):
            (result,), bias = product.node.output, list(product.node.input[2:])
            raw, scaled = f"{result}.product", f"{result}.scaled"
            nodes, constants = multiply(product, f"{name}.even", weight * factors, raw)
            nodes.append(helper.make_node("Mul", [raw, f"{name}.sizes"], [scaled if bias else result], name=scaled))
            if bias:
                nodes.append(helper.make_node("Add", [scaled, *bias], [result], name=f"{result}.biased"))
            replaced[product.node.name] = [*even, *nodes]
            initializers += constants
    path.write_bytes(_replace_nodes(model, replaced, initializers).SerializeToString())


def parse_model(program: Program) -> onnx.ModelProto:
    """Parse the model of an ONNX program; raises ArtifactError if it is not one."""
    assert program.model is not None, "ONNX programs have a model"
    return parse_onnx(program.model(), f"program {program.name!r}")


def _find_products(model: onnx.ModelProto, program: Program) -> dict[str, list[Product]]:
    """Find products with the tower's weights, in the model's order; products of the same rows share a key."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    inputs = {value.name for value in graph.input}
    found: dict[str, list[Product]] = {}
    for node in graph.node:
        if node.op_type != "Gemm" or {a.name: a.i for a in node.attribute} != {"transB": 1}:
            continue
        weight = _origin(node.input[1], makers, _SAME)
        rows = _origin(node.input[0], makers, _SAME | {"Slice"})  # a bucket's patches are cut to the real ones
        if weight in program.weights and rows not in inputs:
            found.setdefault(node.input[0], []).append(Product(node, weight))
    if not found:
        raise ConfigurationError(
            f"program {program.name!r} has no products with weights to quantize.",
            hint="Quantize a bundle that `visionaccel export` wrote.",
        )
    return found


def _origin(name: str, makers: Mapping[str, onnx.NodeProto], through: frozenset[str]) -> str:
    while name in makers and makers[name].op_type in through:
        name = makers[name].input[0]
    return name


def _add_largest(model: onnx.ModelProto, tensors: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """Copy a model and add an output for the largest absolute value of each channel of some matrices.

    Returns the copy and the names of the new outputs.
    """
    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    outputs: list[str] = []
    for number, tensor in enumerate(tensors):
        size, largest = f"size.{number}", f"largest.{number}"
        reduce, axes = _reduce_max(model, size, largest, axis=0, keepdims=0)
        watching.graph.node.extend([helper.make_node("Abs", [tensor], [size]), reduce])
        watching.graph.initializer.extend(axes)
        outputs.append(largest)
    watching.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs)
    return watching, outputs


def _reduce_max(
    model: onnx.ModelProto, name: str, output: str, *, axis: int, keepdims: int
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """Make the node and, from opset 18 on, the constant for its axes, which are then an input."""
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if opset < 18:
        return helper.make_node("ReduceMax", [name], [output], axes=[axis], keepdims=keepdims), []
    axes = numpy_helper.from_array(np.array([axis], np.int64), f"{output}.axes")
    return helper.make_node("ReduceMax", [name, axes.name], [output], keepdims=keepdims), [axes]


def _largest_by_channel(
    tensors: Sequence[str], calls: Iterable[Sequence[NDArray[np.float32]]]
) -> dict[str, NDArray[np.float32]]:
    """Find the largest absolute value in each channel over all calls: float32 [channels] by the matrices' names."""
    found: dict[str, NDArray[np.float32]] = {}
    for answers in calls:
        for tensor, seen in zip(tensors, answers, strict=True):
            found[tensor] = np.maximum(found.get(tensor, 0), seen)
    if not all(np.isfinite(seen).all() for seen in found.values()):
        raise ArtifactError(
            "the program computes NaN or infinity for the calibration images.",
            hint="Export the bundle in float32 again.",
        )
    if not found:
        raise ConfigurationError("no calibration images were passed.", hint="Pass images that fit the programs.")
    return found


def _smoothing_factors(channels: NDArray[np.float32], weights: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Compute the positive factors that divide the rows and multiply all their weights: equation 4 of SmoothQuant."""
    largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    seen = np.maximum(channels, 1e-5 * max(float(channels.max()), 1e-30))
    factors: NDArray[np.float32] = seen**_SMOOTHING / np.maximum(largest, 1e-8) ** (1 - _SMOOTHING)
    return factors.astype(np.float32)


def _even_rows(model: onnx.ModelProto, rows: str, factors: NDArray[np.float32], name: str, least: float) -> Nodes:
    """Make nodes for `name.even`, the smoothed rows divided by their largest values, and `name.sizes`, these values."""
    constants = [
        numpy_helper.from_array(1 / factors, f"{name}.inverse"),
        numpy_helper.from_array(np.array(least, np.float32), f"{name}.least"),
    ]
    reduce, axes = _reduce_max(model, f"{name}.absolute", f"{name}.largest", axis=1, keepdims=1)
    nodes = [
        _named("Mul", [rows, f"{name}.inverse"], f"{name}.smoothed"),
        _named("Abs", [f"{name}.smoothed"], f"{name}.absolute"),
        reduce,
        _named("Max", [f"{name}.largest", f"{name}.least"], f"{name}.sizes"),
        _named("Div", [f"{name}.smoothed", f"{name}.sizes"], f"{name}.even"),
    ]
    return nodes, [*constants, *axes]


def _named(operator: str, inputs: list[str], output: str) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], name=output)


def _replace_nodes(
    model: onnx.ModelProto, replaced: Mapping[str, Sequence[onnx.NodeProto]], initializers: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """Replace nodes of the model by name, and remove nodes and constants that are no longer read."""
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    made: set[str] = set()
    for node in graph.node:
        for each in replaced.get(node.name, [node]):
            if not made.intersection(each.output):  # products of the same rows share the nodes that quantize them
                nodes.append(each)
                made.update(filter(None, each.output))
    read = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    constants = {tensor.name: tensor for tensor in (*graph.initializer, *initializers) if tensor.name in read}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants.values())
    return model
