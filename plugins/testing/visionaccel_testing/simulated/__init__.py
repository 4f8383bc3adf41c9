"""The backend `simulated`: a device with any latency and any fault that uses almost no CPU; see `docs/simulated.md`.

It wraps an installed backend, which computes the answer, and then sleeps for the rest of the configured time, so that
what overlaps with a call, such as decoding, can be measured on a small machine. With the option `replay`, an image that
was seen before takes almost no CPU time.
"""

from collections.abc import Sequence

from visionaccel.backends import VisionBackend, hookimpl
from visionaccel_testing.simulated.backend import SimulatedBackend, SimulatedOptions, Target
from visionaccel_testing.simulated.faults import FaultRule, struck
from visionaccel_testing.simulated.session import OVERRUN, SimulatedSession

__all__ = [
    "OVERRUN", "FaultRule", "SimulatedBackend", "SimulatedOptions", "SimulatedSession", "Target", "struck",
    "visionaccel_backends",
]  # fmt: skip


@hookimpl
def visionaccel_backends() -> Sequence[type[VisionBackend]]:
    """Registers the backend."""
    return [SimulatedBackend]
