"""PyTorch backend for visionaccel: a fast vision tower, and transformers' tower as the numerical reference."""

from collections.abc import Sequence

from visionaccel.backends import VisionBackend, hookimpl
from visionaccel_torch_ref.backend import TorchReferenceBackend

__all__ = ["TorchReferenceBackend", "visionaccel_backends"]


@hookimpl
def visionaccel_backends() -> Sequence[type[VisionBackend]]:
    """Register the backend; torch is imported when a program is probed or opened."""
    return [TorchReferenceBackend]
