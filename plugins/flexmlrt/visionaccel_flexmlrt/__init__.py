"""FlexMLRT backend for visionaccel: runs compiled encoders on AMD's Ryzen AI NPUs, or on a simulator of them."""

from collections.abc import Sequence

from visionaccel.backends import VisionBackend, hookimpl
from visionaccel_flexmlrt.backend import FlexMLRTBackend

__all__ = ["FlexMLRTBackend", "visionaccel_backends"]


@hookimpl
def visionaccel_backends() -> Sequence[type[VisionBackend]]:
    """Register the backend; AMD's library is not loaded before a program is opened."""
    return [FlexMLRTBackend]
