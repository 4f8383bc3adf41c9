"""A circuit breaker: whether a device is to be given work, and why not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum

__all__ = ["Breaker", "BreakerState"]


class BreakerState(StrEnum):
    """Whether an encoder gets work."""

    CLOSED = "closed"
    """It does."""

    OPEN = "open"
    """It does not; others take over."""

    HALF_OPEN = "half-open"
    """Neither: a probe finds out whether it may again."""


class Breaker:
    """Opens after failures in a row, or at once for a reason that leaves no doubt; only a probe closes it.

    Every opening in a row without a success between doubles the time until the next probe. Safe to use from several
    threads.

    Args:
        failures: Failures in a row that open it.
        cool_down: Seconds from the first opening to the probe.
        longest: The most seconds that this grows to.
        changed: Called after each change of state with the new state and the reason, without the lock.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        *,
        failures: int = 5,
        cool_down: float = 1.0,
        longest: float = 60.0,
        changed: Callable[[BreakerState, str], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._cool_down, self._longest = failures, cool_down, longest
        self._changed, self._clock = changed, clock
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._in_a_row = self._openings = 0
        self._probe_at = 0.0
        self._reason, self._for_sure = "", False

    @property
    def state(self) -> BreakerState:
        """The state now."""
        return self._state

    @property
    def closed(self) -> bool:
        """Whether it gets work."""
        return self._state is BreakerState.CLOSED

    @property
    def for_sure(self) -> bool:
        """Whether it was opened for a reason that leaves no doubt, and not by a count of failures."""
        return self._for_sure

    @property
    def reason(self) -> str:
        """Why it was opened last; empty if it never was."""
        return self._reason

    def succeeded(self) -> None:
        """An encode went well."""
        if self._in_a_row or self._openings:  # read without the lock: the usual case must cost nothing
            with self._lock:
                if self._state is BreakerState.CLOSED:
                    self._in_a_row = self._openings = 0

    def failed(self, reason: str) -> None:
        """An encode failed; it opens if that was one too many."""
        with self._lock:
            self._in_a_row += 1
            if self._state is not BreakerState.CLOSED or self._in_a_row < self._limit:
                return
            message = f"{self._in_a_row} encodes in a row failed, the last because {reason}"
            self._for_sure = False
            self._open(message)
        self._changed(BreakerState.OPEN, message)

    def trip(self, reason: str) -> None:
        """Open it, whatever the count, for what leaves no doubt; if it is open already, the probe's time stays."""
        with self._lock:
            known, self._for_sure = self._for_sure, True
            if self._state is BreakerState.OPEN:
                self._reason = self._reason if known else reason
                return
            self._open(reason)
        self._changed(BreakerState.OPEN, reason)

    def hasten(self) -> None:
        """Something happened after which a probe may pass: if it is open, the next one is due."""
        with self._lock:
            self._probe_at = min(self._probe_at, self._clock())

    def begin_probe(self) -> bool:
        """Whether a probe is due; it is half-open then, and `end_probe` must be called."""
        with self._lock:
            if self._state is not BreakerState.OPEN or self._clock() < self._probe_at:
                return False
            self._state = BreakerState.HALF_OPEN
        self._changed(BreakerState.HALF_OPEN, self._reason)
        return True

    def end_probe(self, failure: str | None, *, for_sure: bool = False) -> None:
        """A probe is over: None closes it, a reason opens it again, perhaps one that leaves no doubt."""
        with self._lock:
            if self._state is not BreakerState.HALF_OPEN:
                return  # opened meanwhile, for a reason that the probe knows nothing of
            if failure is None:
                self._state, self._in_a_row, self._for_sure = BreakerState.CLOSED, 0, False
            else:
                self._for_sure |= for_sure
                self._open(failure)
        self._changed(self._state, failure or "the probe passed")

    def _open(self, reason: str) -> None:
        self._state, self._reason, self._in_a_row = BreakerState.OPEN, reason, 0
        self._probe_at = self._clock() + min(self._cool_down * 2.0 ** min(self._openings, 64), self._longest)
        self._openings += 1
