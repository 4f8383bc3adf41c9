"""Calls a function at a time, on a thread of its own."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from visionaccel.core.safe_text import safe_logger

__all__ = ["Alarms"]

logger = safe_logger(__name__)


class Alarms:
    """Functions that are to be called later; each must be short and may be forgotten before its time."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._pending: set[int] = set()
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def set(self, seconds: float, ring: Callable[[], None]) -> int:
        """Call `ring` after that many seconds; the number returned lets one forget it."""
        with self._changed:
            number = next(self._numbers)
            heapq.heappush(self._heap, (time.monotonic() + seconds, number, ring))
            self._pending.add(number)
            if self._heap[0][1] == number:
                self._changed.notify()
            return number

    def forget(self, number: int) -> None:
        """Do not call it any more."""
        with self._changed:
            self._pending.discard(number)
            while self._heap and self._heap[0][1] not in self._pending:
                heapq.heappop(self._heap)
            if len(self._heap) > 64 and len(self._heap) > 2 * len(self._pending):  # most were forgotten
                self._heap = [entry for entry in self._heap if entry[1] in self._pending]
                heapq.heapify(self._heap)

    def close(self) -> None:
        """Call nothing any more, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._heap or self._heap[0][0] > time.monotonic()):
                    # A wait of hours may overflow the platform's lock.
                    left = self._heap[0][0] - time.monotonic() if self._heap else None
                    self._changed.wait(None if left is None else min(left, 3600.0))
                if self._closed:
                    return
                _, number, ring = heapq.heappop(self._heap)
                due = number in self._pending
                self._pending.discard(number)
            if due:
                try:
                    ring()
                except Exception:  # The others still count on this thread.
                    logger.exception("A deadline could not be enforced.")
