"""Reports what became of a link of a chain to observers. An observer's fault costs no encode."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from visionaccel.backends import BreakerReport, DriftReport, FailureReport
from visionaccel.core.containment import tell
from visionaccel.core.grid import Grid
from visionaccel.encoder import Encoder
from visionaccel.errors import VisionAccelError
from visionaccel.trust.breaker import BreakerState
from visionaccel.trust.canary import CanaryResult

_MOST_WAITING = 64
"""Reports kept for an observer that hangs; the oldest go first, and the last says how the breaker is."""


def report_failure(encoder: Encoder, error: VisionAccelError, grids: Sequence[Grid], following: str | None) -> None:
    """An attempt failed."""
    device, kind = encoder.capabilities.device, type(error).__name__
    report = FailureReport(encoder.backend, device, tuple(grids), kind, error.message, following)
    tell(partial(encoder.hooks.visionaccel_failed, report=report))


def report_canary(encoder: Encoder, result: CanaryResult) -> None:
    """A canary was encoded."""
    report = DriftReport(
        encoder.backend, encoder.capabilities.device, "canary", result.encoded, result.lowest_cosine, result.limit,
        result.passed, result.seconds,
    )  # fmt: skip
    tell(partial(encoder.hooks.visionaccel_compared, report=report))


class BreakerReports:
    """Tells observers of a link's breaker, in order, on a thread that lives while there is something to tell.

    So an observer that hangs holds up neither an encode nor the next change of the breaker.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], object]] = deque(maxlen=_MOST_WAITING)
        self._telling = False

    def add(self, encoder: Encoder, state: BreakerState, reason: str) -> None:
        """A link was disabled, is probed, or works again."""
        hook = encoder.hooks.visionaccel_breaker
        if not hook.get_hookimpls():
            return
        report = BreakerReport(encoder.backend, encoder.capabilities.device, state.value, reason)
        with self._lock:
            self._waiting.append(partial(hook, report=report))
            if not self._telling:
                self._telling = True
                threading.Thread(target=self._tell, name="visionaccel-observers", daemon=True).start()

    def _tell(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._telling = False
                    return
                hook = self._waiting.popleft()
            tell(hook)
