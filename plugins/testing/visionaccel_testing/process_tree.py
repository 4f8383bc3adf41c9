"""Memory, processor time and open files of this process and those that it started, from Linux's /proc."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "memory", "open_descriptors", "processor_seconds"]

_PROC = Path("/proc")
_PARENT, _USER, _SYSTEM = 1, 11, 12
"""Places of the numbers in /proc/PID/stat after the name in parentheses, from 0."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in bytes; None where the system does not tell.

    Attributes:
        resident: What is resident now.
        peak: The most that was resident so far, in each process by itself.
    """

    resident: int | None
    peak: int | None


def memory() -> Memory:
    """Memory of this process and its living descendants together. Pages that they share count in each."""
    resident, peak = 0, 0
    for pid in (os.getpid(), *_descendants()):
        with suppress(OSError, ValueError):
            lines = (_PROC / str(pid) / "status").read_text().splitlines()
            values = dict(line.split(":", 1) for line in lines if line.startswith("Vm"))
            resident += _bytes(values.get("VmRSS"))
            peak += _bytes(values.get("VmHWM"))
    return Memory(resident or None, peak or None)


def processor_seconds() -> float:
    """Seconds of processor time that this process and its living descendants have used, of all threads together."""
    seconds, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for pid in _descendants():
        with suppress(OSError, ValueError, IndexError):
            numbers = _stat(pid)
            seconds += (int(numbers[_USER]) + int(numbers[_SYSTEM])) / tick
    return seconds


def open_descriptors() -> int:
    """File descriptors of this process and its living descendants together."""
    count = 0
    for pid in (os.getpid(), *_descendants()):
        with suppress(OSError):
            count += sum(1 for _ in (_PROC / str(pid) / "fd").iterdir())
    return count


def _descendants() -> list[int]:
    parents: dict[int, int] = {}
    for folder in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(folder.name)] = int(_stat(int(folder.name))[_PARENT])
    found = [os.getpid()]
    for pid in found:  # it grows while it is walked
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _stat(pid: int) -> list[str]:
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _bytes(text: str | None) -> int:
    return int(text.split()[0]) * 1024 if text else 0
