"""The breaker of a link: whether it receives images, which it does only in the state `closed`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum

_LONGEST_DELAY = 60.0


class BreakerState(StrEnum):
    """The state of a breaker."""

    CLOSED = "closed"
    """The encoder receives images."""

    OPEN = "open"
    """The encoder is disabled; others take over."""

    HALF_OPEN = "half-open"
    """The encoder is disabled, and a probe finds out whether it can be enabled again."""


class Breaker:
    """Opens after several failures in a row, or immediately on proof; only a probe closes it.

    Each opening without a success since the last one doubles the time until the next probe, up to a minute. Safe to
    use from several threads.

    Args:
        failures: Failures in a row that open it.
        cool_down: Seconds from the first opening to the probe.
        changed: Called after each change of state with the new state and the reason; the lock is not held.
        clock: A monotonic clock, in seconds.

    Attributes:
        state: The current state.
        reason: Why it opened last; empty if it never did.
        proven: Whether it opened on proof of a hang or a wrong answer, and not because of repeated failures.
    """

    def __init__(
        self,
        *,
        failures: int = 5,
        cool_down: float = 1.0,
        changed: Callable[[BreakerState, str], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._cool_down = failures, cool_down
        self._changed, self._clock = changed, clock
        self._lock = threading.Lock()
        self.state = BreakerState.CLOSED
        self._in_a_row = self._openings = 0
        self._probe_at = 0.0
        self.reason, self.proven = "", False
        self._hangs_since: float | None = None

    @property
    def closed(self) -> bool:
        """Whether the encoder receives images."""
        return self.state is BreakerState.CLOSED

    @property
    def hangs_for(self) -> float:
        """Seconds since a call first failed to return in time; 0 if all have since the breaker last closed."""
        since = self._hangs_since
        return 0.0 if since is None else max(1e-9, self._clock() - since)

    @property
    def probe_due(self) -> bool:
        """Whether a probe can begin."""
        return self.state is BreakerState.OPEN and self._clock() >= self._probe_at

    def succeeded(self) -> None:
        """Record an encode that succeeded."""
        if self._in_a_row or self._openings:  # read without the lock, so that the usual case costs nothing
            with self._lock:
                if self.state is BreakerState.CLOSED:
                    self._in_a_row = self._openings = 0

    def failed(self, reason: str) -> None:
        """Record an encode that failed; open the breaker if the limit is reached."""
        with self._lock:
            self._in_a_row += 1
            if self.state is not BreakerState.CLOSED or self._in_a_row < self._limit:
                return
            message = f"{self._in_a_row} encodes in a row failed, the last because {reason}"
            self.proven = False
            self._open(message)
        self._changed(BreakerState.OPEN, message)

    def trip(self, reason: str, *, hangs: bool = False) -> None:
        """Open immediately on proof, such as a call that hangs. If it is already open, its probe is not delayed."""
        with self._lock:
            known, self.proven = self.proven, True
            if hangs and self._hangs_since is None:
                self._hangs_since = self._clock()
            if self.state is BreakerState.OPEN:
                self.reason = self.reason if known else reason
                return
            self._open(reason)
        self._changed(BreakerState.OPEN, reason)

    def hasten(self) -> None:
        """Make the next probe due now, because a call that was left behind has returned."""
        with self._lock:
            self._probe_at = min(self._probe_at, self._clock())

    def begin_probe(self) -> bool:
        """Begin a probe if one is due, and return whether it is. The caller must call `end_probe` then."""
        with self._lock:
            if not self.probe_due:
                return False
            self.state = BreakerState.HALF_OPEN
        self._changed(BreakerState.HALF_OPEN, self.reason)
        return True

    def end_probe(self, failure: str | None) -> None:
        """End a probe: without a failure the breaker closes, otherwise it opens again."""
        with self._lock:
            if self.state is not BreakerState.HALF_OPEN:
                return  # it was opened during the probe, for another reason
            if failure is None:
                self.state, self._in_a_row = BreakerState.CLOSED, 0
                self.proven, self._hangs_since = False, None
            else:
                self._open(failure)
        self._changed(self.state, failure or "the probe passed")

    def _open(self, reason: str) -> None:
        self.state, self.reason, self._in_a_row = BreakerState.OPEN, reason, 0
        self._probe_at = self._clock() + min(self._cool_down * 2.0 ** min(self._openings, 64), _LONGEST_DELAY)
        self._openings += 1
