"""A simulated device with latency but no CPU use: the backend `simulated`.

It wraps an installed backend, which computes the answer, and then sleeps for what is left of the configured time. So
what overlaps with a call, such as decoding, can be measured on a small machine: a call takes of the CPU what the
wrapped backend's computation takes, and with the option `replay` an image that was seen before takes almost nothing. It
also fails on demand. See `docs/simulated.md`.
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
