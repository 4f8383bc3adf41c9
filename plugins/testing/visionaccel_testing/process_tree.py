"""Memory, processor time and open files of this process and its descendants."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in bytes; None if the system does not report it.

    Attributes:
        resident: Resident memory now.
        peak: The sum of each process's largest resident memory so far.
    """

    resident: int | None
    peak: int | None


def memory() -> Memory:
    """Return the total memory of this process and its living descendants. Shared pages count in each process."""
    resident, peak = 0, 0
    for process in _tree():
        with suppress(OSError, ValueError, psutil.Error):
            resident += process.memory_info().rss
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return Memory(resident or None, peak or None)


def processor_seconds() -> float:
    """Return the processor seconds that all threads of this process and its living descendants have used."""
    seconds = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = child.cpu_times()
            seconds += times.user + times.system
    return seconds


def open_descriptors() -> int:
    """Return the number of file descriptors of this process and its living descendants."""
    count = 0
    for process in _tree():
        with suppress(psutil.Error):
            count += process.num_fds()
    return count


def _tree() -> Iterator[psutil.Process]:
    this = psutil.Process()
    yield this
    yield from this.children(recursive=True)
