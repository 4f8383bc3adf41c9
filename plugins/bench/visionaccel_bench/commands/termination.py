"""What a command does on SIGTERM."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def tidy_if_terminated() -> Iterator[None]:
    """While the context lasts, SIGTERM ends the command as an interrupt does: what it started ends, what it made goes.

    For what waits for other processes. A device that hangs in this process would keep the signal from being handled,
    so commands that have one are ended by it at once.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except _Terminated:
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """Passes through everything that lets Ctrl-C pass."""


def _terminated(number: int, _: FrameType | None) -> None:
    signal.signal(number, lambda *_: None)  # a second one must not end the tidying
    raise _Terminated
