"""Products of rows with a tower's stored weights in an ONNX model: found, watched, smoothed, and replaced by others.

For backends that write int8 programs, in any runtime's integer operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionaccel.core.program import Program
from visionaccel.errors import ArtifactError, ConfigurationError

SMOOTHING = 0.5
"""Exponent of the activations in the smoothing factors; the paper's for most models."""

_SAME = frozenset({"Cast", "Identity"})
"""What hands a value on as it is, but for its dtype."""


@dataclass(frozen=True)
class Product:
    """A product of rows with a stored weight [outputs, channels].

    Attributes:
        node: A `Gemm` with `transB`; its third input, if it has one, is the bias.
        weight: The weight's name in the tower.
    """

    node: onnx.NodeProto
    weight: str

    @property
    def rows(self) -> str:
        """Name of the matrix [rows, channels]."""
        return str(self.node.input[0])


def parse_model(program: Program) -> onnx.ModelProto:
    """The ONNX model of a program that has one.

    Raises:
        ArtifactError: If it is none.
    """
    assert program.model is not None, "a program in ONNX"
    try:
        return onnx.load_model_from_string(program.model())
    except Exception as error:  # protobuf's decoding error is not part of its public interface
        raise ArtifactError(
            f"program {program.name!r} is not an ONNX model: {error}", hint="Export it again."
        ) from error


def find_products(model: onnx.ModelProto, program: Program) -> dict[str, list[Product]]:
    """Products with weights of the tower, by the name of their rows, in the model's order; several may share them.

    That of the patches, which is small, is not among them.

    Raises:
        ConfigurationError: If there are none.
    """
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
            f"program {program.name!r} has no products with weights that could be quantized.",
            hint="Quantize a bundle that `visionaccel export` wrote.",
        )
    return found


def _origin(name: str, makers: Mapping[str, onnx.NodeProto], through: frozenset[str]) -> str:
    while name in makers and makers[name].op_type in through:
        name = makers[name].input[0]
    return name


def add_largest(model: onnx.ModelProto, tensors: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a model that also returns the largest absolute value in each channel of some matrices.

    Args:
        model: Any.
        tensors: Names of matrices [rows, channels].

    Returns:
        The copy, and the names of the outputs float32 [channels] that it has in addition to its own.
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
    """The node, and the constant that it needs: since opset 18 the axes are an input."""
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if opset < 18:
        return helper.make_node("ReduceMax", [name], [output], axes=[axis], keepdims=keepdims), []
    axes = numpy_helper.from_array(np.array([axis], np.int64), f"{output}.axes")
    return helper.make_node("ReduceMax", [name, axes.name], [output], keepdims=keepdims), [axes]


def largest_by_channel(
    tensors: Sequence[str], calls: Iterable[Sequence[NDArray[np.float32]]]
) -> dict[str, NDArray[np.float32]]:
    """The largest absolute value in each channel over all calls.

    Args:
        tensors: Names of matrices.
        calls: What `add_largest` made the model return, call by call, in the order of the names.

    Returns:
        float32 [channels] by the names.

    Raises:
        ConfigurationError: If there are no calls.
        ArtifactError: If a value is not finite.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for answers in calls:
        for tensor, seen in zip(tensors, answers, strict=True):
            found[tensor] = np.maximum(found.get(tensor, 0), seen)
    if not all(np.isfinite(seen).all() for seen in found.values()):
        raise ArtifactError(
            "the program makes NaN or infinity of the calibration's images.", hint="Export the bundle in float32 again."
        )
    if not found:
        raise ConfigurationError("there is nothing to calibrate with.", hint="Name images that fit the programs.")
    return found


def smoothing_factors(channels: NDArray[np.float32], weights: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """What to divide the channels of rows by, and to multiply those of the weights by.

    SmoothQuant, https://arxiv.org/abs/2211.10438, equation 4.

    Args:
        channels: The largest absolute value that was seen in each channel, float32 [channels].
        weights: Every weight [outputs, channels] that multiplies these rows.

    Returns:
        float32 [channels], positive.
    """
    largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    seen = np.maximum(channels, 1e-5 * max(float(channels.max()), 1e-30))
    factors: NDArray[np.float32] = seen**SMOOTHING / np.maximum(largest, 1e-8) ** (1 - SMOOTHING)
    return factors.astype(np.float32)


def largest_in_row(
    model: onnx.ModelProto, rows: str, name: str, least: float
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
    """Nodes that give the largest absolute value of each row, and at least `least`, so that one may divide by it.

    Args:
        model: For its opset.
        rows: Name of a matrix [rows, channels].
        name: What the names of the values begin with.
        least: What a row of zeros gets.

    Returns:
        The nodes, their constants, and the name of the value [rows, 1].
    """
    floor = numpy_helper.from_array(np.array(least, np.float32), f"{name}.least")
    reduce, axes = _reduce_max(model, f"{name}.absolute", f"{name}.largest", axis=1, keepdims=1)
    nodes = [
        helper.make_node("Abs", [rows], [f"{name}.absolute"], name=f"{name}.absolute"),
        reduce,
        helper.make_node("Max", [f"{name}.largest", floor.name], [f"{name}.sizes"], name=f"{name}.sizes"),
    ]
    return nodes, [floor, *axes], f"{name}.sizes"


def replace_nodes(
    model: onnx.ModelProto, replaced: Mapping[str, Sequence[onnx.NodeProto]], initializers: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """The model, changed: nodes in the place of others, without what nothing reads any more.

    Args:
        model: Is changed.
        replaced: Nodes by the name of that in whose place they come. What was made already is not made again.
        initializers: Their constants.
    """
    nodes: list[onnx.NodeProto] = []
    made: set[str] = set()
    for node in model.graph.node:
        for each in replaced.get(node.name, [node]):
            if not set(each.output) & made:  # products of the same rows bring the same nodes to quantize them
                nodes.append(each)
                made.update(name for name in each.output if name)
    read = {value.name for value in model.graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    constants = {tensor.name: tensor for tensor in (*model.graph.initializer, *initializers) if tensor.name in read}
    for field, values in (("node", reversed(kept)), ("initializer", constants.values())):
        kept_values = list(values)
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(kept_values)
    return model
