"""Quantization to int8 with ONNX Runtime's own quantizer, after what makes int8 hold a vision tower's activations.

Weights get one scale for each output channel, activations one that is found when they are there. A single channel, or a
single row, that is much larger than the others would leave these a few steps of 256. Therefore each product's input is
divided, channel by channel, by what its weight is multiplied by (SmoothQuant), and then each row is divided by its own
largest value and its result multiplied by it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
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
"""Size of a row of zeros, which stays one."""


def quantize(program: Program, calibration: Iterable[Mapping[str, Array]], folder: Path) -> QuantizedModel:
    """Write a program with products of int8.

    Args:
        program: A float32 program in ONNX of opset 17.
        calibration: Inputs of real images.
        folder: Where to write `NAME.onnx`, which refers to the weights that it did not quantize.

    Raises:
        ConfigurationError: If it is not such a program, or there is nothing to calibrate with or to quantize.
        ArtifactError: If the model or its weights cannot be read.
    """
    if program.format not in _FORMATS or program.precision != "float32" or program.quantization or not program.model:
        raise ConfigurationError(
            f"program {program.name!r} is not a float32 program in ONNX.", hint="Export the bundle in float32."
        )
    model = parse_model(program)
    groups = find_products(model, program)
    largest = watch_activations(model, list(groups), str(program.folder), calibration)
    replaced: dict[str, list[onnx.NodeProto]] = {}
    initializers: list[onnx.TensorProto] = []
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
    return QuantizedModel(program.format, path, METHOD, tools=("onnx", "onnxruntime"))


def _prepare(
    model: onnx.ModelProto,
    rows: str,
    factors: NDArray[np.float32],
    name: str,
    initializers: list[onnx.TensorProto],
) -> tuple[list[onnx.NodeProto], str]:
    """Nodes that smooth a matrix and divide its rows by their sizes, and the name of these; the last makes it."""
    initializers.append(numpy_helper.from_array(1 / factors, f"{name}.inverse"))
    smoothed = helper.make_node("Mul", [rows, f"{name}.inverse"], [f"{name}.smoothed"], name=f"{name}.smoothed")
    nodes, constants, sizes = largest_in_row(model, f"{name}.smoothed", name, _LEAST)
    initializers += constants
    even = helper.make_node("Div", [f"{name}.smoothed", sizes], [f"{name}.even"])
    return [smoothed, *nodes, even], sizes


def _quantized(
    product: Product, rows: str, weight: NDArray[np.float32], sizes: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes that stand for a product, and their constants.

    ONNX Runtime's quantizer gets each product as a separate model, so that no more than one weight is in memory.
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


def watch_activations(
    model: onnx.ModelProto, tensors: Sequence[str], weights_folder: str, calibration: Iterable[Mapping[str, Array]]
) -> dict[str, NDArray[np.float32]]:
    """The largest absolute value in each channel of some of a float32 model's matrices, over all calls on the CPU.

    Args:
        model: Its weights may be external data.
        tensors: Names of matrices [rows, channels].
        weights_folder: Where its external data lies.
        calibration: The inputs of each call.

    Returns:
        float32 [channels] by the names of the matrices.

    Raises:
        ConfigurationError: If there are no calls.
        ArtifactError: If the model cannot be run, or gives no finite numbers.
    """
    import onnxruntime

    watching, outputs = add_largest(model, tensors)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    settings.add_session_config_entry(EXTERNAL_DATA_FOLDER, weights_folder)
    settings.add_session_config_entry(SPINNING, "0")
    try:
        session = onnxruntime.InferenceSession(
            watching.SerializeToString(), settings, providers=[CPU_PROVIDER], enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's own errors have no common base
        raise ArtifactError(f"the program cannot be run: {error}", hint="Export the bundle again.") from error
    return largest_by_channel(tensors, (session.run(outputs, dict(inputs)) for inputs in calibration))
