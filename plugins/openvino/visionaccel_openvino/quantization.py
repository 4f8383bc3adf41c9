"""Quantization to int8 for OpenVINO, which runs products between QuantizeLinear and DequantizeLinear with int8 kernels.

These kernels need one scale for the activations, known in advance. Rows that are evened out first (`onnx_products`) are
between -1 and 1 for every image, so the scale is fixed: no ranges are calibrated, and each row has in effect a separate
scale. OpenVINO merges the smoothing into the operator before the product, such as a norm.

The last product, which is the merger's, is not quantized.
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
from visionaccel.backends.onnx_products import Nodes, Product, quantize_products
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
"""The divisor of a row of zeros; float16 has no smaller number."""

_SCALE, _ZERO = "row.scale", "row.zero"
"""Constants that all products share."""


def quantize(program: Program, calibration: Iterable[Mapping[str, Array]], folder: Path) -> QuantizedModel:
    """Write a program whose products OpenVINO computes in int8.

    Args:
        program: A float32 program in standard ONNX operators.
        calibration: Inputs of real images.
        folder: Where to write `NAME.onnx`, which refers to the weights that are not quantized.

    Raises:
        ConfigurationError: If it is not such a program, has nothing to quantize, or no calibration data is given.
        ArtifactError: If the model or its weights cannot be read.
    """
    standard = program.format == ONNX_STANDARD or (program.format == ONNX and not isinstance(program.coverage, AnyGrid))
    if not standard or program.precision != "float32" or program.quantization or not program.model:
        raise ConfigurationError(
            f"program {program.name!r} is not a float32 program in standard ONNX operators.",
            hint="Export the bundle in float32, and programs for any grid with --dialect standard.",
        )
    path = folder / f"{program.name}.onnx"

    def run(model: onnx.ModelProto, outputs: list[str]) -> Iterator[list[NDArray[np.float32]]]:
        return _answers(program, model, outputs, calibration)

    # OpenVINO computes everything after the last product that is not int8 in float32, even if bfloat16 is requested. If
    # the last product of all is not int8, the operators between the products are in bfloat16 as requested.
    quantize_products(program, path, run, _multiply, least=_LEAST, keep_last=True)
    return QuantizedModel(ONNX_STANDARD, path, METHOD, tools=("onnx", "openvino"))


def _answers(
    program: Program, model: onnx.ModelProto, outputs: Sequence[str], calibration: Iterable[Mapping[str, Array]]
) -> Iterator[list[NDArray[np.float32]]]:
    """Yield outputs of a model with a program's weights for each call, in float32 on the CPU."""
    core = openvino.Core()
    # The mapped weights must live as long as the request; the compiled model copies only most of them.
    read, mapped = read_model(core, replace(program, model=model.SerializeToString))
    try:
        compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        raise ArtifactError(f"the program cannot be run: {error}", hint="Export the bundle again.") from error
    request: Any = compiled.create_infer_request()
    read_names = {name for port in compiled.inputs for name in port.names}  # OpenVINO leaves out unused inputs
    for inputs in calibration:
        named = {program.stored_names.get(name, name): array for name, array in inputs.items()}
        request.infer({name: array for name, array in named.items() if name in read_names})
        yield [request.get_tensor(name).data.copy() for name in outputs]
    mapped.clear()


def _multiply(product: Product, rows: str, weight: NDArray[np.float32], result: str) -> Nodes:
    steps = np.maximum(np.abs(weight).max(axis=1), 1e-20) / np.float32(_STEPS)
    integers = np.rint(weight / steps[:, None]).astype(np.int8)
    quantized, scale, widened = (f"{product.weight}.{part}" for part in ("int8", "scale", "rounded"))
    nodes = [
        helper.make_node("QuantizeLinear", [rows, _SCALE, _ZERO], [f"{rows}.int8"], name=f"{rows}.int8"),
        helper.make_node("DequantizeLinear", [f"{rows}.int8", _SCALE, _ZERO], [f"{rows}.rows"], name=f"{rows}.rows"),
        helper.make_node("DequantizeLinear", [quantized, scale], [widened], name=widened, axis=0),
        helper.make_node("Gemm", [f"{rows}.rows", widened], [result], name=product.node.name, transB=1),
    ]
    constants = {
        quantized: integers,
        scale: steps,
        _SCALE: np.array(1 / _STEPS, np.float32),
        _ZERO: np.array(0, np.int8),
    }
    return nodes, [numpy_helper.from_array(values, name) for name, values in constants.items()]
