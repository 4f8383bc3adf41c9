"""Threads for calls that may hang, for jobs that are due again and again, and for calls in their order.

These hold for the calls of one `WatchedCalls`, on any schedule:

- A call returns, raises or is left behind at its limit, or at its caller's `until` if that comes first.
- A call's limit counts from the moment that it has its place. A caller waits for that for at most one limit for each
  caller before it.
- While a call that was left behind has not returned, no other begins where there is one place; where there are more,
  none begins while four have not.
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
"""Takes a few milliseconds, and returns in how many seconds it is due again."""

LEAST = 0.1
"""Seconds of a step of the engine below which no call is begun."""

_MOST_LATE = 4
_MOST_WAITING = 64
_AFTER_A_FAULT = 1.0
_ENDING = 1.0


class LateError(Exception):
    """A call did not return in time; with a message, it never began, because of another one."""


class CutError(LateError):
    """A caller's `until` came before the call's limit, or the call waited for one of that kind."""


class WatchedCalls:
    """Runs calls on threads that can be left behind. Safe to use from several threads.

    A thread that has returned in time is used again, because the thread pools of runtimes belong to the thread that
    calls them. The threads are daemons: a call that never returns must not keep the program from ending. `returned` is
    called, on the call's thread, when one that was left behind has returned.
    """

    def __init__(self, returned: Callable[[], None] = lambda: None) -> None:
        self._on_return = returned
        self._changed = threading.Condition()
        self._idle: list[_Caller] = []
        self._late: dict[Future[Any], bool] = {}  # and whether `until` cut it off
        self._running = 0
        self._closed = False

    @property
    def cut(self) -> bool:
        """Whether a call that was left behind because of `until` has not returned."""
        with self._changed:
            return any(self._late.values())

    @contextmanager
    def turn(self, function: Callable[[], _T], *, places: int = 1, until: float | None = None) -> Iterator[Future[_T]]:
        """A call on another thread, from the moment that it begins. What has not returned by the end is left behind.

        Args:
            function: The call.
            places: How many calls may be in progress at a time, with this one.
            until: When the caller must return in any case, on the monotonic clock.

        Raises:
            LateError: If it cannot begin.
            CutError: If that is because of `until`, of this call or of an earlier one.
        """
        caller = self._begin(places, until)
        future = caller.start(function)
        try:
            yield future
        finally:
            self._end(caller, future, cut=until is not None and time.monotonic() >= until)

    def call(self, function: Callable[[], _T], seconds: float, *, places: int = 1, until: float | None = None) -> _T:
        """What a call returns or raises within some seconds of its turn; otherwise raises as `turn`."""
        with self.turn(function, places=places, until=until) as future:
            if wait([future], seconds if until is None else min(seconds, seconds_until(until))).done:
                return future.result()
            raise CutError if until is not None and time.monotonic() >= until else LateError

    def close(self, wait: float = 0.0) -> None:
        """Begin no more calls, and end the threads that no call keeps; waits for calls that are not late."""
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
            caller = self._idle.pop() if self._idle else _Caller()  # raises where no thread can be started
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
    """A thread that runs one call after the other."""

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
        del future, function, call  # or a big array would live until the next call


def call_alone(function: Callable[[], _T]) -> Future[_T]:
    """What a call returns or raises on a thread that ends with it, and that may be left behind."""
    caller = _Caller()
    future = caller.start(function)
    caller.end()
    return future


def in_callers_stream(patches: Array, call: Callable[[], _T]) -> Callable[[], _T]:
    """A call that another thread makes on this thread's CUDA stream, where the patches are written."""
    if not is_tensor(patches) or patches.device.type != "cuda":
        return call
    import torch

    stream = torch.cuda.current_stream(patches.device)

    def on_stream() -> _T:
        with torch.cuda.device(patches.device), torch.cuda.stream(stream):
            return call()

    return on_stream


def seconds_until(until: float) -> float:
    """Seconds from now to a time on the monotonic clock, as a lock takes them."""
    return min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)


def _started(function: Callable[[], None], name: str) -> threading.Thread | None:
    """A thread that runs a function; None, and a line in the log, if no more can be started now."""
    thread = threading.Thread(target=function, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        logger.error("Thread %r cannot be started: %s", name, error)
        return None
    return thread


class Background:
    """Runs all jobs of this process on one thread, which lives while there are some. A fork has none of them."""

    _thread: threading.Thread | None

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def start(self, job: Job) -> None:
        """Run a job now, and whenever it is due; if no thread can be started, once another job is started."""
        with self._changed:
            self._due[job] = 0.0
            if self._thread is None:
                self._thread = _started(self._run, "visionaccel-background")
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


class InOrder:
    """Makes calls one after the other, on a thread that lives while there are some, so that no one waits for them.

    Where one hangs, the last 64 of those behind it are kept.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], object]] = deque(maxlen=_MOST_WAITING)
        self._running = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, call: Callable[[], object]) -> None:
        """Make a call once those before have returned; if no thread can be started, once another call is added."""
        with self._lock:
            self._waiting.append(call)
            if not self._running:
                self._running = _started(self._run, self._name) is not None

    def clear(self) -> None:
        """Make none of the calls that wait."""
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
                logger.exception("A call in the background failed in a way that it should not.")
