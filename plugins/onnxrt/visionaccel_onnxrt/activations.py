"""What the products of a model multiply, as calibration shows it: how large each channel is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from visionaccel.arrays import Array
from visionaccel.errors import ArtifactError, ConfigurationError
from visionaccel_onnxrt.providers import CPU_PROVIDER
from visionaccel_onnxrt.session_entries import ERRORS_ONLY, EXTERNAL_DATA_FOLDER, SPINNING

__all__ = ["largest_by_channel"]


def largest_by_channel(
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
        ConfigurationError: If there is no call.
        ArtifactError: If the model cannot be run, or gives no finite numbers.
    """
    import onnxruntime

    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    outputs: list[str] = []
    for number, tensor in enumerate(tensors):
        size, largest = f"size.{number}", f"largest.{number}"
        watching.graph.node.extend(
            [
                onnx.helper.make_node("Abs", [tensor], [size]),
                onnx.helper.make_node("ReduceMax", [size], [largest], axes=[0], keepdims=0),
            ]
        )
        outputs.append(largest)
    watching.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs
    )
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
    found: dict[str, NDArray[np.float32]] = {}
    for inputs in calibration:
        for tensor, seen in zip(tensors, session.run(outputs, dict(inputs)), strict=True):
            found[tensor] = np.maximum(found.get(tensor, 0), seen)
    if not all(np.isfinite(seen).all() for seen in found.values()):
        raise ArtifactError(
            "the program makes NaN or infinity of the calibration's images.", hint="Export the bundle in float32 again."
        )
    if not found:
        raise ConfigurationError("there is nothing to calibrate with.", hint="Name images that fit the programs.")
    return found
