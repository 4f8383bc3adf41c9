"""ONNX Runtime backend for visionaccel: ONNX programs on the CPU or any execution provider."""

from collections.abc import Sequence

from visionaccel.backends import VisionBackend, hookimpl
from visionaccel_onnxrt.backend import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend", "visionaccel_backends"]


@hookimpl
def visionaccel_backends() -> Sequence[type[VisionBackend]]:
    """Registers the backend; onnxruntime is imported only when it is probed or opened."""
    return [OnnxRuntimeBackend]
