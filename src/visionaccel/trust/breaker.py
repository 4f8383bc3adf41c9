"""When a link of a chain gets work: its breaker, and the thread that probes it and runs its canary on a timer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum

from visionaccel.core.safe_text import safe_logger

logger = safe_logger(__name__)

_LONGEST_SLEEP = 3600.0
_PROBING = 0.05


class BreakerState(StrEnum):
    """Whether an encoder gets work."""

    CLOSED = "closed"
    """It does."""

    OPEN = "open"
    """It does not; others take over."""

    HALF_OPEN = "half-open"
    """Neither: a probe finds out whether it may again."""


class Breaker:
    """Opens after failures in a row, or at once on proof; only a probe closes it.

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
        self._reason, self._proven = "", False

    @property
    def state(self) -> BreakerState:
        """The state now."""
        return self._state

    @property
    def closed(self) -> bool:
        """Whether it gets work."""
        return self._state is BreakerState.CLOSED

    @property
    def proven(self) -> bool:
        """Whether it was opened on proof of a hang or a wrong answer, and not by a count of failures."""
        return self._proven

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
            self._proven = False
            self._open(message)
        self._changed(BreakerState.OPEN, message)

    def trip(self, reason: str) -> None:
        """Open it on proof, without counting; if it is open already, the time of its probe stays."""
        with self._lock:
            known, self._proven = self._proven, True
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

    def end_probe(self, failure: str | None, *, proven: bool = False) -> None:
        """A probe is over: None closes it, a reason opens it again, perhaps on proof."""
        with self._lock:
            if self._state is not BreakerState.HALF_OPEN:
                return  # opened during the probe, for a reason that the probe does not know
            if failure is None:
                self._state, self._in_a_row, self._proven = BreakerState.CLOSED, 0, False
            else:
                self._proven |= proven
                self._open(failure)
        self._changed(self._state, failure or "the probe passed")

    def _open(self, reason: str) -> None:
        self._state, self._reason, self._in_a_row = BreakerState.OPEN, reason, 0
        self._probe_at = self._clock() + min(self._cool_down * 2.0 ** min(self._openings, 64), self._longest)
        self._openings += 1


class Keeper:
    """The thread that looks after a link. It starts when there is something to do, and ends with `close`.

    Args:
        breaker: The link's breaker.
        probe: Tries the link; returns what failed, or None, and whether an answer was wrong.
        check: Runs the canary on the timer.
        interval: Seconds between two canaries; 0 for none.
    """

    def __init__(
        self,
        breaker: Breaker,
        probe: Callable[[], tuple[str | None, bool]],
        check: Callable[[], None],
        interval: float,
    ) -> None:
        self._breaker, self._probe, self._check, self._interval = breaker, probe, check, interval
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def wake(self) -> None:
        """There is something to do: the link was disabled, or the first canary has passed."""
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="visionaccel-canary", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, wait: float) -> None:
        """End the thread.

        Args:
            wait: Seconds to wait for a probe or a canary in progress.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait)

    def _run(self) -> None:
        checked = time.monotonic()
        while True:
            with self._changed:
                if not self._closed:
                    self._changed.wait(self._seconds_left(checked))
                if self._closed:
                    return
            if not self._breaker.closed:
                if self._breaker.begin_probe():
                    self._end_probe()
                    checked = time.monotonic()
            elif self._interval and time.monotonic() - checked >= self._interval:
                try:
                    self._check()
                except Exception:  # The thread must live on.
                    logger.exception("A canary on the timer failed in a way that it should not.")
                checked = time.monotonic()

    def _end_probe(self) -> None:
        try:
            failure, wrong = self._probe()
        except Exception as error:  # A probe that was begun must end.
            logger.exception("Probing an encoder failed in a way that it should not.")
            failure, wrong = f"the probe failed with {type(error).__name__}: {error}", False
        self._breaker.end_probe(failure, proven=wrong)

    def _seconds_left(self, checked: float) -> float:
        if not self._breaker.closed:
            return _PROBING
        if self._interval:
            return min(_LONGEST_SLEEP, max(0.0, checked + self._interval - time.monotonic()))
        return _LONGEST_SLEEP
