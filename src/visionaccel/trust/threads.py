"""Threads for calls that may hang, and for jobs in the background.

These rules hold for the calls of one `WatchedCalls`, on any schedule:

- A call returns, raises or is left behind at its limit; a call that is ended at its limit has two more seconds.
- A call's limit counts from when it begins. A caller waits for that for at most one limit for each earlier caller.
- With one place, no call begins while one that was left behind has not returned; with more places, none begins while
  four have not.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeAlias, TypeVar

from visionaccel.core.arrays import Array, is_tensor
from visionaccel.core.safe_text import safe_logger

logger = safe_logger(__name__)

_T = TypeVar("_T")

Job: TypeAlias = Callable[[], float | None]
"""A function that returns the seconds until it is due again, or None if it is done."""

_MOST_LATE = 4
_MOST_WAITING = 64
_AFTER_A_FAULT = 1.0
_ENDING = 1.0
_RETURNING = 2.0
"""Seconds for a call to return after it was ended."""


class LateError(Exception):
    """A call did not return in time. If it has a message, the call never began because of another call."""


class WatchedCalls:
    """Runs calls on threads that can be left behind. Safe to use from several threads.

    A thread whose call returned in time is used again, because a runtime's thread pool belongs to the thread that calls
    it. The threads are daemons: a call that never returns must not keep the program from ending. `returned` is called
    on a call's thread when that call was left behind and has returned.
    """

    def __init__(self, returned: Callable[[], None] = lambda: None) -> None:
        self._on_return = returned
        self._changed = threading.Condition()
        self._idle: list[_Caller] = []
        self._late: set[Future[Any]] = set()
        self._running = 0
        self._closed = False

    @property
    def late(self) -> bool:
        """Whether a call that was left behind has not returned."""
        return bool(self._late)

    def call(
        self,
        function: Callable[[], _T],
        seconds: float,
        *,
        places: int = 1,
        end: Callable[[], bool] = lambda: False,
    ) -> _T:
        """Run a call on another thread, and return or raise what it does.

        Args:
            function: The call.
            seconds: Its limit. After that it is ended if it can be, and left behind if it has not returned even then.
            places: How many calls may be in progress at a time, this one included.
            end: Ends the call if it can, and returns whether it did.

        Raises:
            LateError: If the call is left behind, or cannot begin.
        """
        caller = self._begin(places)
        future = caller.start(function)
        try:
            if not wait([future], seconds).done and not (end() and wait([future], _RETURNING).done):
                raise LateError
            return future.result()
        finally:
            self._end(caller, future)

    def close(self, wait: float = 0.0) -> None:
        """Start no more calls, wait for those that are not late, and end the idle threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._running == 0 or self.late, wait)
            idle, self._idle = self._idle, []
        for caller in idle:
            caller.end(_ENDING)

    def _begin(self, places: int) -> _Caller:
        most_late = 1 if places == 1 else _MOST_LATE
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._late) >= most_late or self._running < places)
            if self._closed:
                raise LateError("It is closed.")
            if len(self._late) >= most_late:
                raise LateError("An earlier call has not returned.")
            caller = self._idle.pop() if self._idle else _Caller()  # raises if no thread can be started
            self._running += 1
            return caller

    def _end(self, caller: _Caller, future: Future[Any]) -> None:
        with self._changed:
            self._running -= 1
            late = not future.done()
            if late:
                self._late.add(future)
            kept = not (late or self._closed)
            if kept:
                self._idle.append(caller)
            self._changed.notify_all()
        if late:
            future.add_done_callback(self._returned)
        if not kept:
            caller.end()

    def _returned(self, future: Future[Any]) -> None:
        with self._changed:
            self._late.remove(future)
            self._changed.notify_all()
        self._on_return()


class _Caller:
    """A thread that runs one call after another."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="visionaccel-call", daemon=True)
        self._thread.start()

    def start(self, function: Callable[[], _T]) -> Future[_T]:
        future: Future[_T] = Future()
        self._work.put((future, function))
        return future

    def end(self, wait: float = 0.0) -> None:
        """End the thread after the call in progress."""
        self._work.put(None)
        if wait and self._thread is not threading.current_thread():
            self._thread.join(wait)

    def _run(self) -> None:
        while (call := self._work.get()) is not None:
            future, function = call
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del future, function, call  # otherwise a big array would live until the next call


def in_callers_stream(patches: Array, call: Callable[[], _T]) -> Callable[[], _T]:
    """Wrap a call so that another thread runs it on this thread's CUDA stream, on which the patches are written."""
    if not is_tensor(patches) or patches.device.type != "cuda":
        return call
    import torch

    stream = torch.cuda.current_stream(patches.device)

    def on_stream() -> _T:
        with torch.cuda.device(patches.device), torch.cuda.stream(stream):
            return call()

    return on_stream


class Background:
    """Runs jobs one after another on one thread, which lives while there are jobs."""

    _thread: threading.Thread | None

    def __init__(self, name: str = "visionaccel-background") -> None:
        self._name = name
        self.forget()

    def start(self, job: Job) -> None:
        """Run a job now, and whenever it is due. If no thread can be started now, `resume` tries again."""
        with self._changed:
            self._due[job] = 0.0
            self._changed.notify_all()
        self.resume()

    def resume(self) -> None:
        """Start the thread if there are jobs and it could not be started before."""
        if not self._due or self._thread is not None:  # read without the lock: the usual case must cost nothing
            return
        with self._changed:
            if self._due and self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    logger.error("Thread %r cannot be started: %s", self._name, error)
                else:
                    self._thread = thread

    def stop(self, job: Job) -> None:
        """Do not run a job again. If it is running now, it continues."""
        with self._changed:
            self._due.pop(job, None)
            self._changed.notify_all()
            ending = None if self._due else self._thread
        if ending is not None and ending is not threading.current_thread():
            ending.join(_ENDING)

    def forget(self) -> None:
        """Drop all jobs and the thread, which a fork does not have."""
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
                left = self._due[job] - time.monotonic()
                if left > 0:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
                    continue
                self._due[job] = math.inf
            try:
                seconds = job()
            except Exception:  # The thread must survive a faulty job.
                logger.exception("Unexpected error in a background job.")
                seconds = _AFTER_A_FAULT
            with self._changed:
                if self._due.get(job) == math.inf:  # it was neither stopped nor started again in between
                    if seconds is None:
                        del self._due[job]
                    else:
                        self._due[job] = time.monotonic() + seconds


background = Background()
"""Runs the periodic jobs of this process, each of which takes milliseconds. A fork starts without jobs."""

os.register_at_fork(after_in_child=background.forget)


class InOrder:
    """Runs calls one after another on a thread that lives while there are calls.

    While a call hangs, the last 64 calls behind it are kept.
    """

    def __init__(self, name: str) -> None:
        self._waiting: deque[Callable[[], object]] = deque(maxlen=_MOST_WAITING)
        self._thread = Background(name)

    def __len__(self) -> int:
        """Return the number of calls that wait."""
        return len(self._waiting)

    def add(self, call: Callable[[], object]) -> None:
        """Run a call after the earlier ones. If no thread can be started now, the next `add` tries again."""
        self._waiting.append(call)
        self._thread.start(self._run_next)

    def clear(self) -> None:
        """Drop the calls that wait."""
        self._waiting.clear()

    def _run_next(self) -> float | None:
        try:
            call = self._waiting.popleft()
        except IndexError:
            return None
        call()
        return 0.0
