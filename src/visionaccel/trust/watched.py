"""Calls that may hang: they run on threads that can be left behind."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeAlias, TypeVar

from visionaccel.core.arrays import Array, is_tensor

__all__ = [
    "CutError", "LateError", "NoTimeError", "WatchedCalls", "in_callers_stream", "returns_within", "seconds_until",
]  # fmt: skip

_T = TypeVar("_T")
_Work: TypeAlias = tuple[Future[object], Callable[[], object]]

_MOST_LATE = 4
_ENDING = 1.0


class LateError(Exception):
    """A call did not return in time, or waited for one that did not."""


class NoTimeError(LateError):
    """A call had no time left before it could begin."""


class CutError(LateError):
    """A call was left behind because its caller's time was over and not its own, or it waited for one of that kind.

    Args:
        message: What happened.
        call: The call that goes on; None if the caller's never began.
        limit: When that call's own time is over, on the monotonic clock.
    """

    def __init__(self, message: str, call: Future[object] | None = None, limit: float = 0.0) -> None:
        super().__init__(message)
        self.call, self.limit = call, limit


class WatchedCalls:
    """Runs calls on threads that can be left behind. Safe to use from several threads.

    A call has its limit from the moment that it has a place. One that exceeds it is left behind: it keeps its thread
    until it returns, and what comes of it is dropped. Calls that wait for a place at that moment fail too, so a caller
    waits for at most one limit for each caller before it. No call begins while another one that was left behind may
    still use what has one place, or while four were left behind: threads that hang do not add up.

    A thread that has returned in time is used again, because the thread pools of runtimes belong to the thread that
    calls them. The threads are daemons: a call that never returns must not keep the program from ending.

    Args:
        returned: Called, on the call's thread, when one that was left behind has returned.
    """

    def __init__(self, returned: Callable[[], None] = lambda: None) -> None:
        self._told = returned
        self._changed = threading.Condition()
        self._idle: list[_Caller] = []
        self._running = self._late = self._left_behind = self._cut = 0
        self._closed = self._last_was_cut = False

    @property
    def late(self) -> int:
        """Calls that were left behind and have not returned."""
        return self._late

    @property
    def cut(self) -> int:
        """Those of them that were left behind because of `until`."""
        return self._cut

    def call(self, function: Callable[[], _T], seconds: float, *, places: int = 1, until: float | None = None) -> _T:
        """What the function returns or raises.

        Args:
            function: Runs on another thread.
            seconds: How long it may take.
            places: How many calls may be in progress at a time, with this one.
            until: When this call must have returned in any case, on the monotonic clock.

        Raises:
            LateError: If it does not return in time, or none can begin.
            CutError: If that is because of `until`, of this call or of an earlier one.
            NoTimeError: If it had no time left when it could begin.
        """
        caller = self._begin(places, until)
        limit = time.monotonic() + seconds
        end = limit if until is None else min(limit, until)
        future = caller.start(function)
        try:
            return future.result(seconds_until(end))  # type: ignore[return-value]
        except TimeoutError:
            if future.done():  # it raised that itself, or returned at the last moment
                return future.result()  # type: ignore[return-value]
            if end < limit:
                raise CutError("It did not return", future, limit) from None
            raise LateError("It did not return") from None
        finally:
            self._end(caller, future, cut=end < limit)

    def close(self, wait: float = 0.0) -> None:
        """Begin no call any more, and end the threads that no call keeps.

        Args:
            wait: Seconds to wait for calls in progress, but not for those that are late.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._running == 0 or self._late > 0, wait)
            idle, self._idle = self._idle, []
        for caller in idle:
            caller.end(_ENDING)

    def _begin(self, places: int, until: float | None) -> _Caller:
        most_late = 1 if places == 1 else _MOST_LATE
        with self._changed:
            before = self._left_behind

            def settled() -> bool:
                hopeless = self._closed or self._late >= most_late or self._left_behind != before
                return hopeless or self._running < places

            in_time = self._changed.wait_for(settled, None if until is None else seconds_until(until))
            if self._closed:
                raise LateError("It is closed")
            if not in_time or (until is not None and time.monotonic() >= until):
                raise NoTimeError("Other calls took its time")
            if self._late >= most_late or self._left_behind != before:
                kind = CutError if self._last_was_cut else LateError
                raise kind("An earlier call has not returned")
            caller = self._idle.pop() if self._idle else _Caller()
            self._running += 1
            return caller

    def _end(self, caller: _Caller, future: Future[object], *, cut: bool) -> None:
        with self._changed:
            self._running -= 1
            kept = future.done() and not self._closed
            if kept:
                self._idle.append(caller)
            elif not future.done():
                self._late += 1
                self._left_behind += 1
                self._cut += cut
                self._last_was_cut = cut
                future.add_done_callback(partial(self._returned, cut))
            self._changed.notify_all()
        if not kept:
            caller.end()

    def _returned(self, cut: bool, _: Future[object]) -> None:
        with self._changed:
            self._late -= 1
            self._cut -= cut
            self._changed.notify_all()
        self._told()


class _Caller:
    """A thread that runs one call after the other."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._work,), name="visionaccel-call", daemon=True)
        self._thread.start()

    def start(self, function: Callable[[], object]) -> Future[object]:
        future: Future[object] = Future()
        self._work.put((future, function))
        return future

    def end(self, wait: float = 0.0) -> None:
        """Let the thread end after the call in progress."""
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


def returns_within(call: Callable[[], bool], seconds: float) -> bool:
    """What a call returns; False if it takes longer than that, and is left behind."""
    calls = WatchedCalls()
    try:
        return calls.call(call, seconds)
    except LateError:
        return False
    finally:
        calls.close()
