"""Runs a link's canary: before its first encode, after a restart, on a timer, and as a probe while it is disabled."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import DeviceError, VisionAccelError
from visionaccel.trust.canary import Canary, CanaryResult
from visionaccel.trust.threads import background

if TYPE_CHECKING:
    from visionaccel.trust.link import ChainLink

logger = safe_logger(__name__)

_T = TypeVar("_T")

_PROBING = 0.05


class Keeper:
    """Runs one link's canary and acts on its results.

    If not `on`, the canary runs only as a probe while the link is disabled. An interval of 0 means no timer.
    """

    def __init__(self, link: ChainLink, canary: Canary, *, on: bool, interval: float) -> None:
        self._link, self._canary, self._on = link, canary, on
        self._interval = interval if on and interval else math.inf
        self._checking, self._lock = threading.RLock(), threading.Lock()
        self._passed_restarts: int | None = None
        self._checked_at = 0.0
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def unverified(self) -> bool:
        """Whether the canary must pass before the next encode: it has not run since the device's process started."""
        return self._on and self._link.restarts != self._passed_restarts

    def run_verified(self, encoder: Encoder, attempt: Callable[[], _T]) -> _T:
        """Run an attempt on a device that has passed a canary since it, or its process, started; return its result.

        Raises:
            VisionAccelError: The attempt's error, or why the device cannot be used.
        """
        while True:
            if self.unverified:
                with self._checking:  # one caller runs it while the others wait
                    failure = self.check(encoder).failure if self.unverified else None
                if failure is not None:
                    raise DeviceError(f"{self._link.name} failed its canary: {failure}")
            before, answer = self._link.restarts, attempt()
            if not self._on or self._link.restarts == before:
                return answer  # otherwise it may come from a process that no canary has checked

    def check(self, encoder: Encoder, *, probing: bool = False) -> CanaryResult:
        """Run the canary now, and disable the link if it answers wrong. Only the first run takes all golden images."""
        link = self._link
        with self._checking:
            restarts, first = link.restarts, self._passed_restarts is None
            limit = link.open_deadline if first else link.deadline

            def encode(patches: Array, grids: Sequence[Grid]) -> Array:
                return link.call(partial(encoder.encode, patches, grids, purpose="canary"), limit * len(grids))

            result = self._canary.check(encoder, encode, quick=not first)
            if result.failure is None:
                self._passed_restarts = restarts
        if first:
            self.wake()
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

    def _tick(self) -> float:
        """Start a canary or probe that is due, on its own thread; return the seconds until the next look."""
        breaker = self._link.breaker
        with self._lock:
            if self._closed or (self._thread is not None and self._thread.is_alive()):
                return _PROBING
            if breaker.closed:
                left = self._checked_at + self._interval - time.monotonic()
                due = left <= 0 and not self._link.cut
            else:
                left, due = 0.0, breaker.probe_due
            if due:
                probing = not breaker.closed
                thread = threading.Thread(target=self._run, args=(probing,), name="visionaccel-canary", daemon=True)
                thread.start()
                self._thread = thread
            return max(left, _PROBING)

    def _run(self, probing: bool) -> None:
        breaker, wrong = self._link.breaker, False
        if probing and not breaker.begin_probe():
            return
        failure: str | None
        try:
            result = self.check(self._link.open(), probing=probing)
            failure, wrong = result.failure, result.wrong
        except VisionAccelError as error:
            failure = f"it cannot be opened: {error.message}"
        except Exception as error:  # A probe that has begun must end.
            logger.exception("Unexpected error in a canary.")
            failure = f"the probe failed with {type(error).__name__}: {error}"
        if probing:
            breaker.end_probe(failure, proven=wrong)
        elif failure is not None and not wrong:
            breaker.failed(f"its canary failed: {failure}")
        self._checked_at = time.monotonic()
