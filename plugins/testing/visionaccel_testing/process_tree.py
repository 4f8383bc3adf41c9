"""Memory, processor time and open files of this process and those that it started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in bytes; None where the system does not say.

    Attributes:
        resident: What is resident now.
        peak: The most that was resident so far, in each process by itself.
    """

    resident: int | None
    peak: int | None


def memory() -> Memory:
    """Memory of this process and its living descendants together. Pages that they share count in each."""
    resident, peak = 0, 0
    for process in _tree():
        with suppress(OSError, ValueError, psutil.Error):
            resident += process.memory_info().rss
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return Memory(resident or None, peak or None)


def processor_seconds() -> float:
    """Seconds of processor time that this process and its living descendants have used, of all threads together."""
    seconds = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = child.cpu_times()
            seconds += times.user + times.system
    return seconds


def open_descriptors() -> int:
    """File descriptors of this process and its living descendants together."""
    count = 0
    for process in _tree():
        with suppress(psutil.Error):
            count += process.num_fds()
    return count


def _tree() -> Iterator[psutil.Process]:
    this = psutil.Process()
    yield this
    yield from this.children(recursive=True)
