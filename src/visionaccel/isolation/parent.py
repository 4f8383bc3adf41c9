"""A child's tie to its parent."""

from __future__ import annotations

import ctypes
import os
import signal

__all__ = ["end_with_parent"]

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends.

    Nothing that runs Python could do so: a thread that waits for the parent's end gets no turn while vendor code hangs
    with the interpreter's lock held. The signal comes when the parent's thread that started this process ends, which is
    why a thread that outlives this process has to start it.

    Args:
        parent: The parent's process id.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # It ended before the line above.
        os._exit(1)
