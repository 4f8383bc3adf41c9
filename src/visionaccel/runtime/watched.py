"""Calls that may hang: they run on a thread that can be left behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["WatchedCalls"]

_T = TypeVar("_T")


class WatchedCalls:
    """Runs calls one after the other on a thread of its own. One that is late keeps that thread; the next gets another.

    The thread is a daemon: a call that never returns must not keep the program from ending. Used by one thread at a
    time, such as an engine's.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] | None = None

    def call(self, function: Callable[[], _T], seconds: float) -> _T:
        """What the function returns or raises.

        Raises:
            TimeoutError: If it takes longer; it goes on, and nobody looks at what comes of it.
        """
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name="visionaccel-call", daemon=True).start()
        future: Future[object] = Future()
        self._calls.put((future, function))
        try:
            return future.result(seconds)  # type: ignore[return-value]
        except TimeoutError:
            if not future.done():
                self.close()
            raise

    def close(self) -> None:
        """Let the thread end after the call in progress."""
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None


def _serve(calls: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None]) -> None:
    while (call := calls.get()) is not None:
        future, function = call
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del future, function, call  # or a big array would live until the next call
