"""What the products of a model multiply, as ONNX Runtime's CPU shows it in calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from visionaccel.backends.onnx_products import add_largest, largest_by_channel
from visionaccel.core.arrays import Array
from visionaccel.errors import ArtifactError
from visionaccel_onnxrt.providers import CPU_PROVIDER
from visionaccel_onnxrt.session_entries import ERRORS_ONLY, EXTERNAL_DATA_FOLDER, SPINNING

__all__ = ["watch_activations"]


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
        ConfigurationError: If there is no call.
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
