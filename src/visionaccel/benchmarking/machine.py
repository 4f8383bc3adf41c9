"""What this machine is, and what of it a benchmark may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cores", "processor_name"]


def cores() -> tuple[int, ...]:
    """The processor's cores that this process may run on, by their numbers."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def processor_name() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
