"""Runs a link's canary: before its first encode, after a restart, on a timer, and as a probe while it is disabled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from visionaccel.backends import DriftReport
from visionaccel.core.arrays import Array
from visionaccel.core.containment import tell
from visionaccel.core.grid import Grid
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import DeadlineError, DeviceError, VisionAccelError
from visionaccel.trust.canary import Canary, CanaryResult
from visionaccel.trust.threads import LEAST, background, seconds_until

if TYPE_CHECKING:
    from visionaccel.trust.link import ChainLink

logger = safe_logger(__name__)

_T = TypeVar("_T")

_LONGEST_SLEEP = 3600.0
_PROBING = 0.05


class Keeper:
    """Runs one link's canary and acts on its results.

    If not `on`, the canary runs only as a probe while the link is disabled. An interval of 0 means no timer.
    """

    def __init__(self, link: ChainLink, canary: Canary, *, on: bool, interval: float) -> None:
        self._link, self._canary, self._on, self._interval = link, canary, on, interval if on else 0.0
        self._checking, self._lock = threading.RLock(), threading.Lock()
        self._passed_restarts: int | None = None
        self._checked_at = 0.0
        self._thread: threading.Thread | None = None
        self._closed = False

    def verified(self, encoder: Encoder, attempt: Callable[[], _T], until: float | None) -> _T:
        """Run an attempt on a device that has passed a canary since it, or its process, started; return its result.

        Raises:
            VisionAccelError: The attempt's error, or why the device cannot be used.
        """
        while self._on:
            if self._link.restarts != self._passed_restarts:
                self._require(encoder, until)
            before, answer = self._link.restarts, attempt()
            if self._link.restarts == before:  # otherwise it may come from a process that no canary has checked
                return answer
        return attempt()

    def check(self, encoder: Encoder, *, probing: bool = False, until: float | None = None) -> CanaryResult:
        """Run the canary now, and disable the link if it answers wrong. Only the first run takes all golden images."""
        link = self._link
        with self._checking:
            restarts, first = link.restarts, self._passed_restarts is None
            limit = link.open_deadline if first else link.deadline

            def encode(patches: Array, grids: Sequence[Grid]) -> Array:
                return link.call(partial(encoder.encode, patches, grids, purpose="canary"), limit * len(grids), until)

            result = self._canary.check(encoder, encode, quick=not first)
            if result.failure is None:
                self._passed_restarts = restarts
        if first:
            self.wake()
        report = DriftReport(
            encoder.backend, encoder.capabilities.device, "canary", result.encoded, result.lowest_cosine, result.limit,
            result.failure is None, result.seconds,
        )  # fmt: skip
        tell(partial(encoder.hooks.visionaccel_compared, report=report))
        if result.wrong and not self._closed:
            if not probing:
                link.distrust(f"its canary failed: {result.failure}")
            elif not link.breaker.proven:
                link.forget()  # it was used all the same while nothing else was healthy
        return result

    def wake(self) -> None:
        """Start looking after the link: it was disabled, or its first canary has run."""
        with self._lock:
            if not self._closed:
                self._checked_at = time.monotonic()
                background.start(self._tick)

    def close(self, wait: float) -> None:
        """Run no more canaries, and wait for one in progress."""
        with self._lock:
            self._closed, thread = True, self._thread
        background.stop(self._tick)
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait)

    def _require(self, encoder: Encoder, until: float | None) -> None:
        link = self._link
        late = DeadlineError(f"the first canary of {link.name} is still running.", hint="Try again later.")
        if not self._checking.acquire(timeout=-1 if until is None else seconds_until(until)):
            raise late
        try:
            if link.restarts == self._passed_restarts:
                return  # another caller has run it
            failure = self.check(encoder, until=until).failure
        finally:
            self._checking.release()
        if failure is not None:
            if link.cut or (until is not None and seconds_until(until) < LEAST):
                raise late
            raise DeviceError(f"{link.name} failed its canary: {failure}")

    def _tick(self) -> float:
        """Start a canary or probe that is due, on its own thread; return the seconds until the next look."""
        breaker = self._link.breaker
        with self._lock:
            if self._closed or (self._thread is not None and self._thread.is_alive()):
                return _PROBING
            probing = not breaker.closed
            if not probing:
                left = self._checked_at + self._interval - time.monotonic() if self._interval else _LONGEST_SLEEP
                if left > 0 or self._link.cut:
                    return max(left, _PROBING)
            elif not breaker.probe_due:
                return _PROBING
            thread = threading.Thread(target=self._run, args=(probing,), name="visionaccel-canary", daemon=True)
            thread.start()
            self._thread = thread
            return _PROBING

    def _run(self, probing: bool) -> None:
        breaker, wrong = self._link.breaker, False
        if probing and not breaker.begin_probe():
            return
        failure: str | None
        try:
            encoder = self._link.open(probing=probing)
            if isinstance(encoder, VisionAccelError):
                failure = f"it cannot be opened: {encoder.message}"
            else:
                result = self.check(encoder, probing=probing)
                failure, wrong = result.failure, result.wrong
        except Exception as error:  # A probe that has begun must end.
            logger.exception("Unexpected error in a canary.")
            failure = f"the probe failed with {type(error).__name__}: {error}"
        if probing:
            breaker.end_probe(failure, proven=wrong)
        elif failure is not None and not wrong:
            breaker.failed(f"its canary failed: {failure}")
        self._checked_at = time.monotonic()
