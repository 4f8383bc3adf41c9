"""What of this machine a benchmark may use."""

from __future__ import annotations

import os

__all__ = ["cores"]


def cores() -> tuple[int, ...]:
    """The processor's cores that this process may run on, by their numbers."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
