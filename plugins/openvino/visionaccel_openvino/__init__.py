"""OpenVINO backend for visionaccel: Intel's and other CPUs, Intel's GPUs and NPUs."""

from collections.abc import Sequence

from visionaccel.backends import VisionBackend, hookimpl
from visionaccel_openvino.backend import OpenVinoBackend

__all__ = ["OpenVinoBackend", "visionaccel_backends"]


@hookimpl
def visionaccel_backends() -> Sequence[type[VisionBackend]]:
    """Register the backend; openvino is imported when a program is probed or opened."""
    return [OpenVinoBackend]
