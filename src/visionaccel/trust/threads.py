"""Threads for calls that may hang, for periodic jobs, and for calls that run one after another.

These rules hold for the calls of one `WatchedCalls`, on any schedule:

- A call returns, raises or is left behind at its limit, or at its caller's `until` if that comes first.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from visionaccel.core.arrays import Array, is_tensor
from visionaccel.core.safe_text import safe_logger

logger = safe_logger(__name__)

_T = TypeVar("_T")
_Work: TypeAlias = tuple[Future[Any], Callable[[], Any]]

Job: TypeAlias = Callable[[], float]
"""A function that takes a few milliseconds, and returns the seconds until it is due again."""

LEAST = 0.1
"""With fewer seconds than this left in an engine's step, no call begins."""

_MOST_LATE = 4
_MOST_WAITING = 64
_AFTER_A_FAULT = 1.0
_ENDING = 1.0


class LateError(Exception):
    """A call did not return in time; if there is a message, it never began, because of another call."""


class CutError(LateError):
    """A caller's `until` came before the call's limit, or the call waited for one that was cut off like that."""


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
        self._late: dict[Future[Any], bool] = {}  # the value: whether `until` cut it off
        self._running = 0
        self._closed = False

    @property
    def cut(self) -> bool:
        """Whether a call that was left behind because of `until` has not returned."""
        with self._changed:
            return any(self._late.values())

    @contextmanager
    def turn(self, function: Callable[[], _T], *, places: int = 1, until: float | None = None) -> Iterator[Future[_T]]:
        """Run a call on another thread; enter when it begins. If it has not returned by the exit, it is left behind.

        Args:
            function: The call.
            places: How many calls may be in progress at a time, this one included.
            until: The latest time for the caller to return, on the monotonic clock.

        Raises:
            LateError: If the call cannot begin.
            CutError: If that is because of `until`, either this call's or an earlier one's.
        """
        caller = self._begin(places, until)
        future = caller.start(function)
        try:
            yield future
        finally:
            self._end(caller, future, cut=until is not None and time.monotonic() >= until)

    def call(self, function: Callable[[], _T], seconds: float, *, places: int = 1, until: float | None = None) -> _T:
        """Return or raise what a call does within some seconds of its begin. Raises the errors of `turn` otherwise."""
        with self.turn(function, places=places, until=until) as future:
            if wait([future], seconds if until is None else min(seconds, seconds_until(until))).done:
                return future.result()
            raise CutError if until is not None and time.monotonic() >= until else LateError

    def close(self, wait: float = 0.0) -> None:
        """Begin no more calls, wait for those that are not late, and end the idle threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._running == 0 or bool(self._late), wait)
            idle, self._idle = self._idle, []
        for caller in idle:
            caller.end(_ENDING)

    def _begin(self, places: int, until: float | None) -> _Caller:
        most_late = 1 if places == 1 else _MOST_LATE
        seconds = None if until is None else seconds_until(until)
        with self._changed:
            begins = self._changed.wait_for(
                lambda: self._closed or len(self._late) >= most_late or self._running < places, seconds
            )
            if self._closed:
                raise LateError("It is closed.")
            if not begins or (until is not None and time.monotonic() >= until):
                raise CutError
            if len(self._late) >= most_late:
                raise CutError if all(self._late.values()) else LateError("An earlier call has not returned.")
            caller = self._idle.pop() if self._idle else _Caller()  # raises if no thread can be started
            self._running += 1
            return caller

    def _end(self, caller: _Caller, future: Future[Any], *, cut: bool) -> None:
        with self._changed:
            self._running -= 1
            late = not future.done()
            if late:
                self._late[future] = cut
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
            del self._late[future]
            self._changed.notify_all()
        self._on_return()


class _Caller:
    """A thread that runs one call after another."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._work,), name="visionaccel-call", daemon=True)
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


def _serve(work: queue.SimpleQueue[_Work | None]) -> None:
    while (call := work.get()) is not None:
        future, function = call
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del future, function, call  # otherwise a big array would live until the next call


def call_alone(function: Callable[[], _T]) -> Future[_T]:
    """Run a call on a new thread, which ends with it and may be left behind."""
    caller = _Caller()
    future = caller.start(function)
    caller.end()
    return future


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


def seconds_until(until: float) -> float:
    """Seconds from now to a time on the monotonic clock, in the range that locks accept."""
    return min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)


def _started(function: Callable[[], None], name: str) -> threading.Thread | None:
    """Start a thread that runs a function. If no thread can be started now, log that and return None."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        logger.error("Thread %r cannot be started: %s", name, error)
        return None
    return thread


class Background:
    """Runs all jobs of this process on one thread, which lives while there are jobs. A fork starts without jobs."""

    _thread: threading.Thread | None

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def start(self, job: Job) -> None:
        """Run a job now, and whenever it is due. If no thread can be started now, `resume` tries again."""
        with self._changed:
            self._due[job] = 0.0
            self._changed.notify_all()
        self.resume()

    def resume(self) -> None:
        """Start the thread if there are jobs and it could not be started before."""
        if self._due and self._thread is None:  # read without the lock: the usual case must cost nothing
            with self._changed:
                if self._due and self._thread is None:
                    self._thread = _started(self._run, "visionaccel-background")

    def stop(self, job: Job) -> None:
        """Do not run a job again. If it is running now, it goes on."""
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
            except Exception:  # The thread must survive a faulty job.
                logger.exception("Unexpected error in a background job.")
                seconds = _AFTER_A_FAULT
            with self._changed:
                if self._due.get(job) == math.inf:  # it was neither stopped nor started again in between
                    self._due[job] = time.monotonic() + seconds


background = Background()


class InOrder:
    """Runs calls one after another in the background, on a thread that lives while there are calls.

    While a call hangs, the last 64 calls behind it are kept.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], object]] = deque(maxlen=_MOST_WAITING)
        self._running = False

    def __len__(self) -> int:
        """The number of calls that wait."""
        return len(self._waiting)

    def add(self, call: Callable[[], object]) -> None:
        """Run a call after the earlier ones. If no thread can be started now, the next `add` tries again."""
        with self._lock:
            self._waiting.append(call)
            if not self._running:
                self._running = _started(self._run, self._name) is not None

    def clear(self) -> None:
        """Drop the calls that wait."""
        with self._lock:
            self._waiting.clear()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                call = self._waiting.popleft()
            try:
                call()
            except Exception:
                logger.exception("Unexpected error in a background call.")
