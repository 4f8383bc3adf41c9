"""The thread that looks after a link of a chain: it probes one that is disabled, and runs the canary on a timer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from visionaccel.core.safe_text import safe_logger
from visionaccel.trust.breaker import Breaker

__all__ = ["Keeper"]

logger = safe_logger(__name__)

_LONGEST_SLEEP = 3600.0
_PROBING = 0.05


class Keeper:
    """Starts its thread when there is something to do, and ends it with `close`.

    Args:
        breaker: The link's breaker.
        probe: Tries the link; returns what failed, or None, and whether it answered wrongly.
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
                    self._changed.wait(self._until(checked))
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
        self._breaker.end_probe(failure, for_sure=wrong)

    def _until(self, checked: float) -> float:
        if not self._breaker.closed:
            return _PROBING
        if self._interval:
            return min(_LONGEST_SLEEP, max(0.0, checked + self._interval - time.monotonic()))
        return _LONGEST_SLEEP
