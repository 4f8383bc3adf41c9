"""Weights of a model, bound as the memory that they are mapped to.

ONNX Runtime opens external data by paths only, and only below the model's folder. A copy in memory has no such path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visionaccel.errors import ArtifactError
from visionaccel.onnx_weights import external_weights, map_weights

__all__ = ["bind_weights"]


def bind_weights(model: bytes, folder: Path, settings: Any) -> list[Any]:
    """Bind the external weights of a model to the options of the session that will run it.

    Args:
        model: A serialized ONNX model.
        folder: What the locations of its external data are relative to.
        settings: The session's options.

    Returns:
        What must live as long as the session.

    Raises:
        ArtifactError: If the model or a weight cannot be read.
    """
    import onnx
    import onnxruntime

    try:
        external = external_weights(onnx.load_model_from_string(model))
    except Exception as error:  # protobuf's decoding error is not part of its public interface
        raise ArtifactError(f"the ONNX model cannot be read: {error}.", hint="Write it again.") from error
    values = [
        onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, external[name].data_type)
        for name, array in map_weights(external.values(), folder).items()
    ]
    settings.add_external_initializers(list(external), values)
    return values
