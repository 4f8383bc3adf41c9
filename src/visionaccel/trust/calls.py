"""Calls that may hang: they run on threads that can be left behind.

These hold for the calls of one `WatchedCalls`, on any schedule:

- A call returns, raises or is left behind at its limit, or at its caller's `until` if that comes first.
- A call's limit counts from the moment that it has its place. A caller waits for that for at most one limit for each
  caller before it.
- While a call that was left behind has not returned, no other begins where there is one place; where there are more,
  none begins while four have not.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeAlias, TypeVar

from visionaccel.core.arrays import Array, is_tensor

_T = TypeVar("_T")
_Work: TypeAlias = tuple[Future[object], Callable[[], object]]

_MOST_LATE = 4
_ENDING = 1.0


class LateError(Exception):
    """A call did not return in time, or waited for one that did not."""


class CutError(LateError):
    """A caller's `until` came before the call's limit, or the call waited for one of that kind.

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

    A thread that has returned in time is used again, because the thread pools of runtimes belong to the thread that
    calls them. The threads are daemons: a call that never returns must not keep the program from ending.

    Args:
        returned: Called, on the call's thread, when one that was left behind has returned.
    """

    def __init__(self, returned: Callable[[], None] = lambda: None) -> None:
        self._on_return = returned
        self._changed = threading.Condition()
        self._idle: list[_Caller] = []
        self._late: dict[Future[object], bool] = {}
        self._running = self._left_behind = 0
        self._left_by_cut = False
        self._closed = False

    @property
    def cut(self) -> bool:
        """Whether a call that was left behind because of `until` has not returned."""
        with self._changed:
            return any(self._late.values())

    def call(
        self,
        function: Callable[[], _T],
        seconds: float,
        *,
        places: int = 1,
        until: float | None = None,
        end: Callable[[Future[object]], bool] = lambda _: False,
    ) -> _T:
        """What the function returns or raises.

        Args:
            function: Runs on another thread.
            seconds: How long it may take.
            places: How many calls may be in progress at a time, with this one.
            until: When this call must have returned in any case, on the monotonic clock.
            end: Ends a call that is past its limit; returns whether the call has returned.

        Raises:
            LateError: If it does not return in time, or none can begin.
            CutError: If that is because of `until`, of this call or of an earlier one.
        """
        caller = self._begin(places, until)
        limit = time.monotonic() + seconds
        stop = limit if until is None else min(limit, until)
        future, cut = caller.start(function), stop < limit
        try:
            return future.result(seconds_until(stop))  # type: ignore[return-value]
        except TimeoutError:
            if future.done() or (stop == limit and end(future)):  # it raised that itself, or returned just now
                return future.result()  # type: ignore[return-value]
            cut = until is not None and time.monotonic() >= until
            if cut:  # it may still end, for which its caller has no time
                raise CutError("It did not return", future, limit) from None
            raise LateError("It did not return") from None
        finally:
            self._end(caller, future, cut=cut)

    def close(self, wait: float = 0.0) -> None:
        """Begin no more calls, and end the threads that no call keeps.

        Args:
            wait: Seconds to wait for calls in progress, but not for those that are late.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._running == 0 or bool(self._late), wait)
            idle, self._idle = self._idle, []
        for caller in idle:
            caller.end(_ENDING)

    def _begin(self, places: int, until: float | None) -> _Caller:
        most_late = 1 if places == 1 else _MOST_LATE
        with self._changed:
            before = self._left_behind

            def blocked() -> bool:
                return len(self._late) >= most_late or self._left_behind != before

            in_time = self._changed.wait_for(
                lambda: self._closed or blocked() or self._running < places,
                None if until is None else seconds_until(until),
            )
            if self._closed:
                raise LateError("It is closed")
            if not in_time or (until is not None and time.monotonic() >= until):
                raise CutError("Other calls took its time")
            if blocked():
                cut = all(self._late.values()) if self._late else self._left_by_cut
                kind = CutError if cut else LateError
                raise kind("An earlier call has not returned")
            self._running += 1
            return self._idle.pop() if self._idle else _Caller()

    def _end(self, caller: _Caller, future: Future[object], *, cut: bool) -> None:
        with self._changed:
            self._running -= 1
            done = future.done()
            kept = done and not self._closed
            if kept:
                self._idle.append(caller)
            if not done:
                self._late[future] = cut
                self._left_behind += 1
                self._left_by_cut = cut
            self._changed.notify_all()
        if not kept:
            caller.end()
        if not done:
            future.add_done_callback(self._returned)

    def _returned(self, future: Future[object]) -> None:
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
