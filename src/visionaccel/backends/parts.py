"""What a session may tell of its call: how long transfers took beside the computation.

Told only while somebody looks: `call_parts` is None otherwise, and costs a session one look at a thread's variable.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["CallParts", "call_parts", "watch_parts"]


@dataclass(slots=True)
class CallParts:
    """Parts of the calls of one encode, in seconds; sessions add to them.

    Attributes:
        transfer_in: Bringing inputs to the device, or into its process.
        transfer_out: Bringing outputs back.
    """

    transfer_in: float = 0.0
    transfer_out: float = 0.0


class _OfThread(threading.local):
    parts: CallParts | None = None


_current = _OfThread()


def call_parts() -> CallParts | None:
    """Where a session in `run` adds what its transfers took; None if nobody looks."""
    return _current.parts


@contextmanager
def watch_parts() -> Iterator[CallParts]:
    """Look at the calls that this thread makes."""
    before, _current.parts = _current.parts, CallParts()
    try:
        yield _current.parts
    finally:
        _current.parts = before
