"""Weights of a model, bound as the memory that they are mapped to.

ONNX Runtime opens external data by paths only, and only below the model's folder. A copy in memory has no such path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    import onnxruntime

    from visionaccel.backends.onnx_weights import mapped_weights  # which imports onnx

    weights = mapped_weights(model, folder)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(*weight) for weight in weights.values()]
    settings.add_external_initializers(list(weights), values)
    return values
