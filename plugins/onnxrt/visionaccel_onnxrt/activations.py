"""What the products of a model multiply, as calibration shows it: how large each channel is, and how rows differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from visionaccel.arrays import Array
from visionaccel.errors import ConfigurationError

__all__ = ["Activation", "observe"]


@dataclass(frozen=True)
class Activation:
    """A matrix that is an operand of products.

    Attributes:
        channels: float32 [channels]; the largest absolute value of each channel over all rows.
        evenness: Median over maximum of the rows' largest absolute values, 0 to 1; the least of all calls.
    """

    channels: NDArray[np.float32]
    evenness: float


def observe(
    model: onnx.ModelProto, tensors: Sequence[str], weights_folder: str, calibration: Iterable[Mapping[str, Array]]
) -> dict[str, Activation]:
    """Run a float32 model on the CPU and look at some of its matrices.

    Args:
        model: Its weights may be external data.
        tensors: Names of matrices [rows, channels].
        weights_folder: Where its external data lies.
        calibration: The inputs of each call.

    Raises:
        ConfigurationError: If there is no call.
    """
    import onnxruntime

    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    outputs: list[str] = []
    for number, tensor in enumerate(tensors):
        size, columns, rows = (f"{kind}.{number}" for kind in ("size", "columns", "rows"))
        watching.graph.node.extend(
            [
                onnx.helper.make_node("Abs", [tensor], [size]),
                onnx.helper.make_node("ReduceMax", [size], [columns], axes=[0], keepdims=0),
                onnx.helper.make_node("ReduceMax", [size], [rows], axes=[1], keepdims=0),
            ]
        )
        outputs += [columns, rows]
    watching.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs
    )
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", weights_folder)
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        watching.SerializeToString(), settings, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    found: dict[str, Activation] = {}
    for inputs in calibration:
        seen = session.run(outputs, dict(inputs))
        for tensor, columns, rows in zip(tensors, seen[0::2], seen[1::2], strict=True):
            before = found.get(tensor, Activation(np.zeros_like(columns), 1.0))
            evenness = float(np.median(rows) / max(rows.max(), np.finfo(np.float32).tiny))
            found[tensor] = Activation(np.maximum(before.channels, columns), min(before.evenness, evenness))
    if not found:
        raise ConfigurationError("there is nothing to calibrate with.", hint="Name images that fit the programs.")
    return found
