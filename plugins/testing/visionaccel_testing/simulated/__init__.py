"""A simulated device with latency but no CPU use: the backend `simulated`.

It wraps an installed backend, which computes the answer, and then sleeps for what is left of the wished time. So what
overlaps with a call, such as decoding beside encoding, can be measured on a small machine: of the CPU a call takes what
the wrapped backend's computation takes, and with the option `replay` an image that was seen before takes almost
nothing. It also fails as it is told to. See `docs/simulated.md`.
"""

from collections.abc import Sequence

from visionaccel.backends import VisionBackend, hookimpl
from visionaccel_testing.simulated.backend import SimulatedBackend, SimulatedOptions
from visionaccel_testing.simulated.faults import FaultRule, struck
from visionaccel_testing.simulated.session import SimulatedSession
from visionaccel_testing.simulated.target import Target

__all__ = [
    "FaultRule", "SimulatedBackend", "SimulatedOptions", "SimulatedSession", "Target", "struck", "visionaccel_backends",
]  # fmt: skip


@hookimpl
def visionaccel_backends() -> Sequence[type[VisionBackend]]:
    """Registers the backend."""
    return [SimulatedBackend]
