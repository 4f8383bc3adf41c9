"""PyTorch backend for visionaccel: a fast vision tower, and transformers' own as the numerical reference."""

from collections.abc import Sequence

from visionaccel.backends import VisionBackend, hookimpl
from visionaccel_torch_ref.backend import TorchReferenceBackend

__all__ = ["TorchReferenceBackend", "visionaccel_backends"]


@hookimpl
def visionaccel_backends() -> Sequence[type[VisionBackend]]:
    """Registers the backend; torch is imported only when it is probed or opened."""
    return [TorchReferenceBackend]
