"""Quantization to int8 for OpenVINO: products between quantizing and dequantizing, whose int8 kernels it then takes.

OpenVINO's int8 kernels want one scale of the activations that is known beforehand. A single channel, or a single row,
that is much larger than the others would leave these a few steps of 256, and an image that was not shown may be larger
than all that were. Therefore each product's input is divided, channel by channel, by what its weight is multiplied by
(SmoothQuant), and then each row by its own largest value: for every image, its values lie between -1 and 1 and reach
one of them. That is the scale, so nothing is left for a calibration of ranges, and each row has in effect its own.

The last product, which is the merger's, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionaccel.backends import QuantizedModel
from visionaccel.backends.onnx_products import (
    Product,
    add_largest,
    find_products,
    largest_by_channel,
    largest_in_row,
    parse_model,
    replace_nodes,
    smoothing_factors,
)
from visionaccel.core.arrays import Array
from visionaccel.core.program import ONNX, ONNX_STANDARD, AnyGrid, Program
from visionaccel.errors import ArtifactError, ConfigurationError
from visionaccel_openvino.model import read_model

METHOD = (
    "int8 products: weights by channel, activations row by row, smoothed by the images (ONNX's quantize, dequantize)"
)

_STEPS = 127
"""Steps from 0 to the largest value."""

_LEAST = 2.0**-24
"""Size of a row of zeros, which stays one; float16 has no smaller number."""

_SCALE, _ZERO = "row.scale", "row.zero"


def quantize(program: Program, calibration: Iterable[Mapping[str, Array]], folder: Path) -> QuantizedModel:
    """Write a program whose products OpenVINO computes in int8.

    Args:
        program: A float32 program in standard ONNX operators.
        calibration: Inputs of real images.
        folder: Where to write `NAME.onnx`, which refers to the weights that it did not quantize.

    Raises:
        ConfigurationError: If it is not such a program, or there is nothing to calibrate with or to quantize.
        ArtifactError: If the model or its weights cannot be read.
    """
    standard = program.format == ONNX_STANDARD or (program.format == ONNX and not isinstance(program.coverage, AnyGrid))
    if not standard or program.precision != "float32" or program.quantization or not program.model:
        raise ConfigurationError(
            f"program {program.name!r} is not a float32 program in standard ONNX operators.",
            hint="Export the bundle in float32, and programs for any grid with --dialect standard.",
        )
    model = parse_model(program)
    groups = find_products(model, program)
    if len(groups) > 1:
        # From a graph's end back to the first product that is not of int8, OpenVINO computes in float32, at any
        # precision that it is asked for. With this one left, what lies between the products is in bfloat16 if asked.
        groups.popitem()
    watching, outputs = add_largest(model, list(groups))
    largest = largest_by_channel(list(groups), _answers(program, watching, outputs, calibration))
    replaced: dict[str, list[onnx.NodeProto]] = {}
    initializers = [
        numpy_helper.from_array(np.array(1 / _STEPS, np.float32), _SCALE),
        numpy_helper.from_array(np.array(0, np.int8), _ZERO),
    ]
    for number, (rows, group) in enumerate(groups.items()):
        weights = [program.weights[product.weight].read().astype(np.float32) for product in group]
        factors = smoothing_factors(largest[rows], weights)
        prepared, sizes = _prepare(model, rows, factors, f"smooth.{number}", initializers)
        for place, (product, weight) in enumerate(zip(group, weights, strict=True)):
            nodes, tensors = _quantized(product, prepared[-1].output[0], weight * factors, sizes)
            replaced[product.node.name] = [*(prepared if place == 0 else []), *nodes]
            initializers += tensors
    path = folder / f"{program.name}.onnx"
    path.write_bytes(replace_nodes(model, replaced, initializers).SerializeToString())
    return QuantizedModel(ONNX_STANDARD, path, METHOD, tools=("onnx", "openvino"))


def _answers(
    program: Program, model: onnx.ModelProto, outputs: Sequence[str], calibration: Iterable[Mapping[str, Array]]
) -> Iterator[list[NDArray[np.float32]]]:
    """Some outputs of a model over a program's weights, in float32 on the CPU, call by call."""
    core = openvino.Core()
    # What is mapped must live as long as the request; what is compiled holds its own copy of most of it.
    read, mapped = read_model(core, replace(program, model=model.SerializeToString))
    try:
        compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ArtifactError(f"the program cannot be run: {error}", hint="Export the bundle again.") from error
    request: Any = compiled.create_infer_request()
    read_names = {name for port in compiled.inputs for name in port.names}  # what nothing reads is left out
    for inputs in calibration:
        named = {program.stored_names.get(name, name): array for name, array in inputs.items()}
        request.infer({name: array for name, array in named.items() if name in read_names})
        yield [request.get_tensor(name).data.copy() for name in outputs]
    mapped.clear()


def _prepare(
    model: onnx.ModelProto,
    rows: str,
    factors: NDArray[np.float32],
    name: str,
    initializers: list[onnx.TensorProto],
) -> tuple[list[onnx.NodeProto], str]:
    """Nodes that smooth and quantize a matrix, and the name of its rows' sizes; the last node gives the matrix.

    OpenVINO takes the smoothing into what makes the matrix, such as a norm's scale, and the rest into one pass.
    """
    initializers.append(numpy_helper.from_array(1 / factors, f"{name}.inverse"))
    smoothed = helper.make_node("Mul", [rows, f"{name}.inverse"], [f"{name}.smoothed"], name=f"{name}.smoothed")
    nodes, constants, sizes = largest_in_row(model, f"{name}.smoothed", name, _LEAST)
    initializers += constants
    scale = [_SCALE, _ZERO]
    return [
        smoothed,
        *nodes,
        helper.make_node("Div", [f"{name}.smoothed", sizes], [f"{name}.even"], name=f"{name}.even"),
        helper.make_node("QuantizeLinear", [f"{name}.even", *scale], [f"{name}.int8"], name=f"{name}.int8"),
        helper.make_node("DequantizeLinear", [f"{name}.int8", *scale], [f"{name}.rows"], name=f"{name}.rows"),
    ], sizes


def _quantized(
    product: Product, rows: str, weight: NDArray[np.float32], sizes: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes that stand for a product, and their constants."""
    (result,) = product.node.output
    steps = np.maximum(np.abs(weight).max(axis=1), 1e-20) / np.float32(_STEPS)
    integers = np.rint(weight / steps[:, None]).astype(np.int8)
    quantized, scale = f"{product.weight}.int8", f"{product.weight}.scale"
    widened, raw, scaled = f"{product.weight}.rounded", f"{result}.product", f"{result}.scaled"
    nodes = [
        helper.make_node("DequantizeLinear", [quantized, scale], [widened], name=widened, axis=0),
        helper.make_node("Gemm", [rows, widened], [raw], name=product.node.name, transB=1),
        helper.make_node("Mul", [raw, sizes], [scaled], name=scaled),
    ]
    if len(product.node.input) > 2:
        nodes.append(helper.make_node("Add", [scaled, product.node.input[2]], [result], name=f"{result}.biased"))
    else:
        nodes[-1].output[0] = result
    return nodes, [numpy_helper.from_array(integers, quantized), numpy_helper.from_array(steps, scale)]
