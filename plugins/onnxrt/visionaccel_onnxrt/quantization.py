"""Quantization to int8 with ONNX Runtime's quantizer, of rows that are evened out first (`onnx_products`).

Weights have one scale for each output channel, activations one that is computed at run time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from visionaccel.backends import QuantizedModel
from visionaccel.backends.onnx_products import Nodes, Product, quantize_products
from visionaccel.core.arrays import Array
from visionaccel.core.program import ONNX, ONNX_FUSED, Program
from visionaccel.errors import ArtifactError, ConfigurationError
from visionaccel_onnxrt.providers import CPU_PROVIDER
from visionaccel_onnxrt.session import ERRORS_ONLY, EXTERNAL_DATA_FOLDER, SPINNING

METHOD = (
    "int8 products: weights by channel, activations at run time, smoothed by the images, row by row "
    "(onnxruntime.quantization)"
)

_FORMATS = frozenset({ONNX, ONNX_FUSED})
_LEAST = 1e-20
"""The divisor of a row of zeros."""


def quantize(program: Program, calibration: Iterable[Mapping[str, Array]], folder: Path) -> QuantizedModel:
    """Write a program with products of int8.

    Args:
        program: A float32 program in ONNX of opset 17.
        calibration: Inputs of real images.
        folder: Where to write `NAME.onnx`, which refers to the weights that are not quantized.

    Raises:
        ConfigurationError: If it is not such a program, has nothing to quantize, or no calibration data is given.
        ArtifactError: If the model or its weights cannot be read.
    """
    if program.format not in _FORMATS or program.precision != "float32" or program.quantization or not program.model:
        raise ConfigurationError(
            f"program {program.name!r} is not a float32 ONNX program.", hint="Export the bundle in float32."
        )
    path = folder / f"{program.name}.onnx"

    def run(model: onnx.ModelProto, outputs: list[str]) -> Iterator[Sequence[NDArray[np.float32]]]:
        session = _open(model, str(program.folder))
        return (session.run(outputs, dict(inputs)) for inputs in calibration)

    quantize_products(program, path, run, _multiply, least=_LEAST)
    return QuantizedModel(program.format, path, METHOD, tools=("onnx", "onnxruntime"))


def _open(model: onnx.ModelProto, weights_folder: str) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    settings.add_session_config_entry(EXTERNAL_DATA_FOLDER, weights_folder)
    settings.add_session_config_entry(SPINNING, "0")
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), settings, providers=[CPU_PROVIDER], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's own errors have no common base
        raise ArtifactError(f"the program cannot be run: {error}", hint="Export the bundle again.") from error


def _multiply(product: Product, rows: str, weight: NDArray[np.float32], result: str) -> Nodes:
    """Each product is quantized as a separate model, so that no more than one weight is in memory."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    alone = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", [rows, product.weight], [result], name=product.node.name)],
            "product",
            [helper.make_tensor_value_info(rows, onnx.TensorProto.FLOAT, ["rows", weight.shape[1]])],
            [helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, ["rows", weight.shape[0]])],
            [numpy_helper.from_array(np.ascontiguousarray(weight.T), product.weight)],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    # Otherwise the quantizer warns that a model should be simplified first.
    alone.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as work:
        written = Path(work, "product.onnx")
        quantize_dynamic(alone, written, per_channel=True, weight_type=QuantType.QInt8)
        found = onnx.load_model(written)
    return list(found.graph.node), list(found.graph.initializer)
