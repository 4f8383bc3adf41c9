"""Quantization to int8 with ONNX Runtime's own quantizer, after what makes int8 hold a vision tower's activations.

Weights get one scale for each output channel, activations one that is found when they are there. A single channel, or a
single row, that is much larger than the others would leave these a few steps of 256. Therefore each product's input is
divided, channel by channel, by what its weight is multiplied by (SmoothQuant, https://arxiv.org/abs/2211.10438,
equation 4), and then each row is divided by its own largest value and its result multiplied by it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionaccel.arrays import FLOATS, Array
from visionaccel.backends import QuantizedModel
from visionaccel.checkpoint import StoredTensor
from visionaccel.errors import ArtifactError, ConfigurationError
from visionaccel.program import ONNX, ONNX_FUSED, Program
from visionaccel_onnxrt.activations import largest_by_channel

__all__ = ["quantize"]

SMOOTHING = 0.5
"""Exponent of the activations in the smoothing factors; the paper's for most models."""

METHOD = (
    "int8 products: weights by channel, activations at run time, smoothed by the images, row by row "
    "(onnxruntime.quantization)"
)

_FORMATS = frozenset({ONNX, ONNX_FUSED})
_SAME = frozenset({"Cast", "Identity"})
"""What hands a value on as it is, but for its dtype."""


@dataclass(frozen=True)
class _Product:
    """A product of rows with a stored weight [outputs, channels]."""

    node: onnx.NodeProto
    weight: str

    @property
    def rows(self) -> str:
        return str(self.node.input[0])


def quantize(program: Program, calibration: Iterable[Mapping[str, Array]], folder: Path) -> QuantizedModel:
    """Write a program with products of int8.

    Args:
        program: A float32 program in ONNX of opset 17.
        calibration: Inputs of real images.
        folder: Where to write `NAME.onnx`, which refers to the weights that it did not quantize.

    Raises:
        ConfigurationError: If it is no such program, or there is nothing to calibrate with or to quantize.
        ArtifactError: If the model or its weights cannot be read.
    """
    if program.format not in _FORMATS or program.precision != "float32" or program.quantization or not program.model:
        raise ConfigurationError(
            f"program {program.name!r} is no float32 program in ONNX.", hint="Export the bundle in float32."
        )
    try:
        model = onnx.load_model_from_string(program.model())
    except DecodeError as error:
        raise ArtifactError(f"program {program.name!r} is no ONNX model: {error}", hint="Export it again.") from error
    products = _products(model.graph, program.weights)
    if not products:
        raise ConfigurationError(
            f"program {program.name!r} has no products with weights that could be quantized.",
            hint="Quantize a bundle that `visionaccel export` wrote.",
        )
    groups: dict[str, list[_Product]] = {}
    for product in products:
        groups.setdefault(product.rows, []).append(product)
    largest = largest_by_channel(model, list(groups), str(program.folder), calibration)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    initializers: list[onnx.TensorProto] = []
    for number, (rows, group) in enumerate(groups.items()):
        weights = [_read(program.weights[product.weight]) for product in group]
        prepared, factors, sizes = _prepare(rows, largest[rows], weights, number, initializers)
        for place, (product, weight) in enumerate(zip(group, weights, strict=True)):
            nodes, tensors = _quantized(product, prepared[-1].output[0], weight * factors, sizes)
            replaced[product.node.name] = [*(prepared if place == 0 else []), *nodes]
            initializers += tensors
    path = folder / f"{program.name}.onnx"
    path.write_bytes(_rewritten(model, replaced, initializers).SerializeToString())
    return QuantizedModel(program.format, path, METHOD, tools=("onnx", "onnxruntime"))


def _products(graph: onnx.GraphProto, weights: Mapping[str, StoredTensor]) -> list[_Product]:
    """Products with a weight of the tower, but for that of the patches, which is small."""
    makers = {name: node for node in graph.node for name in node.output}
    inputs = {value.name for value in graph.input}
    found = []
    for node in graph.node:
        if node.op_type != "Gemm" or {a.name: helper.get_attribute_value(a) for a in node.attribute} != {"transB": 1}:
            continue
        weight = _origin(node.input[1], makers, _SAME)
        rows = _origin(node.input[0], makers, _SAME | {"Slice"})  # a bucket's patches are cut to the real ones
        if weight in weights and rows not in inputs:
            found.append(_Product(node, weight))
    return found


def _origin(name: str, makers: Mapping[str, onnx.NodeProto], through: frozenset[str]) -> str:
    while name in makers and makers[name].op_type in through:
        name = makers[name].input[0]
    return name


def _read(stored: StoredTensor) -> NDArray[np.float32]:
    count = int(np.prod(stored.shape))
    try:
        values = np.fromfile(stored.file, FLOATS[stored.dtype], count, offset=stored.offset)
        return values.reshape(stored.shape).astype(np.float32)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"weight {stored.name!r} cannot be read from {stored.file}: {error}", hint="Fetch the file again."
        ) from error


def _prepare(
    rows: str,
    channels: NDArray[np.float32],
    weights: list[NDArray[np.float32]],
    number: int,
    initializers: list[onnx.TensorProto],
) -> tuple[list[onnx.NodeProto], NDArray[np.float32], str]:
    """Nodes that smooth a matrix, the factors of the weights' channels, and the rows' sizes, which they are divided by.

    The last node gives the matrix.
    """
    name = f"smooth.{number}"
    largest = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    seen = np.maximum(channels, 1e-5 * max(float(channels.max()), 1e-30))
    factors = (seen**SMOOTHING / np.maximum(largest, 1e-8) ** (1 - SMOOTHING)).astype(np.float32)
    initializers.append(numpy_helper.from_array(1 / factors, f"{name}.inverse"))
    nodes = [helper.make_node("Mul", [rows, f"{name}.inverse"], [f"{name}.smoothed"], name=f"{name}.smoothed")]
    initializers.append(numpy_helper.from_array(np.array(1e-20, np.float32), f"{name}.least"))
    sizes = f"{name}.sizes"
    nodes += [
        helper.make_node("Abs", [f"{name}.smoothed"], [f"{name}.absolute"], name=f"{name}.absolute"),
        helper.make_node("ReduceMax", [f"{name}.absolute"], [f"{name}.largest"], axes=[1], keepdims=1),
        helper.make_node("Max", [f"{name}.largest", f"{name}.least"], [sizes]),  # a row of zeros stays one
        helper.make_node("Div", [f"{name}.smoothed", sizes], [f"{name}.even"]),
    ]
    return nodes, factors, sizes


def _quantized(
    product: _Product, rows: str, weight: NDArray[np.float32], sizes: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes that stand for a product, and their constants.

    ONNX Runtime's quantizer gets each product as a model of its own, so that no more than one weight is in memory.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    (result,) = product.node.output
    raw = f"{result}.product"
    alone = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", [rows, product.weight], [raw], name=product.node.name)],
            "product",
            [helper.make_tensor_value_info(rows, onnx.TensorProto.FLOAT, ["rows", weight.shape[1]])],
            [helper.make_tensor_value_info(raw, onnx.TensorProto.FLOAT, ["rows", weight.shape[0]])],
            [numpy_helper.from_array(np.ascontiguousarray(weight.T), product.weight)],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    # The quantizer else warns that a model should be simplified first.
    alone.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as work:
        written = Path(work, "product.onnx")
        quantize_dynamic(alone, written, per_channel=True, weight_type=QuantType.QInt8)
        found = onnx.load_model(written)
    scaled = f"{raw}.scaled"
    nodes = [*found.graph.node, helper.make_node("Mul", [raw, sizes], [scaled], name=scaled)]
    if len(product.node.input) > 2:
        nodes.append(helper.make_node("Add", [scaled, product.node.input[2]], [result], name=f"{raw}.biased"))
    else:
        nodes[-1].output[0] = result
    return nodes, list(found.graph.initializer)


def _rewritten(
    model: onnx.ModelProto, replaced: Mapping[str, list[onnx.NodeProto]], initializers: list[onnx.TensorProto]
) -> onnx.ModelProto:
    """The model with nodes in the place of others, without what nothing reads any more."""
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
