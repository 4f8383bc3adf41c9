"""Threads for what nobody waits for: one for jobs that are due again and again, and one for calls in their order."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from visionaccel.core.containment import tell
from visionaccel.core.safe_text import safe_logger

logger = safe_logger(__name__)

Job: TypeAlias = Callable[[], float]
"""Takes a few milliseconds, and returns in how many seconds it is due again."""

_AFTER_A_FAULT = 1.0
_ENDING = 1.0
_MOST_REPORTS = 64


class Background:
    """Runs all jobs of this process on one thread, which lives while there are some. A fork has none of them."""

    _thread: threading.Thread | None

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def start(self, job: Job) -> None:
        """Run a job now, and whenever it is due."""
        with self._changed:
            self._due[job] = 0.0
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="visionaccel-background", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stop(self, job: Job) -> None:
        """Run a job no more; one that runs now goes on."""
        with self._changed:
            self._due.pop(job, None)
            self._changed.notify_all()
            ending = None if self._due else self._thread
        if ending is not None and ending is not threading.current_thread():
            ending.join(_ENDING)

    def _forget(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[Job, float] = {}
        self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._due:
                    self._thread = None
                    return
                job = min(self._due, key=self._due.__getitem__)
                seconds = self._due[job] - time.monotonic()
                if seconds > 0:
                    self._changed.wait(min(seconds, threading.TIMEOUT_MAX))
                    continue
                self._due[job] = math.inf
            try:
                seconds = job()
            except Exception:  # The thread must survive a job's fault.
                logger.exception("A job in the background failed in a way that it should not.")
                seconds = _AFTER_A_FAULT
            with self._changed:
                if self._due.get(job) == math.inf:  # it was not stopped or started again since
                    self._due[job] = time.monotonic() + seconds


background = Background()


class Reports:
    """Tells observers in order, on a thread that lives while there is something to tell, so a hang holds up no one.

    For an observer that hangs the last reports are kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], object]] = deque(maxlen=_MOST_REPORTS)
        self._telling = False

    def add(self, hook: Callable[[], object]) -> None:
        """Call a hook once those before have returned."""
        with self._lock:
            self._waiting.append(hook)
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
