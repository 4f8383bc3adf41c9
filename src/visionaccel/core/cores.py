"""Which CPU cores an encoder's threads run on, next to the other work of the machine.

A runtime's thread pool inherits the cores of the thread that creates it, and takes its size from their number. So an
encoder is opened and called by threads that are pinned to its cores (`on_cores`).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from visionaccel.errors import SettingsError

ALL: Literal["all"] = "all"

WantedCores: TypeAlias = frozenset[int] | Literal["all"] | None
"""Core numbers, `all` cores that this process may use, or None for the cores that a language model leaves free."""

_MOST = 1 << 16
_BINDING = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_HW_SUBSET")
_TOPOLOGY = Path("/sys/devices/system/cpu")

_here = threading.local()


@dataclass(frozen=True, slots=True)
class Host:
    """The cores of a machine that runs a language model too.

    Attributes:
        usable: Cores that this process may use.
        taken: Cores that the language model computes on while images are encoded.
        why: Why they are taken, as a clause.
    """

    usable: frozenset[int]
    taken: frozenset[int]
    why: str


class CoreChoice(NamedTuple):
    """The cores of an encoder, and why, as a clause; None if threads are not pinned and runtimes size their pools."""

    cores: frozenset[int] | None = None
    why: str = ""


def parse_cores(text: str) -> frozenset[int] | Literal["all"]:
    """Parse a list of core numbers and ranges such as `0-3,8`, or `all`; ValueError if it is neither."""
    if text.strip().lower() == ALL:
        return ALL
    cores: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST:
            raise ValueError(f"{part.strip()!r} is not a core or core range such as 0-3,8, or all")
        cores.update(range(first, last + 1))
    return frozenset(cores)


def shown_cores(cores: Iterable[int]) -> str:
    """Write cores as `parse_cores` reads them, such as `0-3,8`."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and runs[-1][-1] == core - 1:
            runs[-1][1:] = [core]
        else:
            runs.append([core])
    return ",".join("-".join(map(str, run)) for run in runs)


def process_cores(pid: int | None = None) -> frozenset[int]:
    """Return the cores that the main thread of a process, by default this one, may run on; OSError if it has ended."""
    return _allowed(os.getpid() if pid is None else pid)


def choose_cores(wanted: WantedCores, host: Host | None = None) -> CoreChoice:
    """Choose the cores that the setting `cpu_cores` lists, or else those that the language model leaves free.

    A thread that shares a physical core with the language model slows it down, so the language model keeps all hardware
    threads of its physical cores, as long as others remain. `host` is None if no language model computes on this
    machine.

    Raises:
        SettingsError: If the setting lists a core that this process may not use.
    """
    usable = process_cores() if host is None else host.usable
    if wanted is None:
        if host is None:
            return CoreChoice()
        apart = frozenset(core for core in usable if not _physical(core) & host.taken)
        left = apart or usable - host.taken
        return CoreChoice(left or usable, host.why if left else f"{host.why}, which leaves no other core")
    if wanted == ALL:
        return CoreChoice(usable, "VISIONACCEL_CPU_CORES=all")
    shown = f"VISIONACCEL_CPU_CORES={shown_cores(wanted)}"
    if beyond := wanted - usable:
        raise SettingsError(
            f"{shown}: this process may not use {shown_cores(beyond)}, or they do not exist.",
            hint=f"It may use {shown_cores(usable)}.",
        )
    return CoreChoice(wanted, shown)


@contextmanager
def on_cores(cores: frozenset[int] | None, *, strict: bool = False) -> Iterator[None]:
    """Pin the current thread, and the threads it starts, to these cores; afterwards it runs where it ran before.

    Args:
        cores: The cores; None to change nothing.
        strict: Require all of them. Otherwise cores that this thread may no longer use are ignored.

    Raises:
        SettingsError: If `strict`, and this thread cannot be pinned to all of them.
    """
    if cores is None:
        yield
        return
    before, outer = _allowed(), cores_here()
    _here.cores = cores
    try:
        _move(cores)
        if strict and _allowed() != cores:
            raise SettingsError(
                f"threads of this process cannot be pinned to cores {shown_cores(cores)}.",
                hint=f"They may run on {shown_cores(_allowed())}.",
            )
        yield
    finally:
        _here.cores = outer
        _move(before)


def cores_here() -> frozenset[int] | None:
    """Return the cores of this thread's innermost `on_cores`, to pin another thread to; None outside."""
    return getattr(_here, "cores", None)


def thread_limit() -> int | None:
    """Return the size of a thread pool that this thread creates: one for each physical core that it may run on.

    None if this thread may run on every core and its cores were not chosen: the runtime's default is as good then.
    """
    allowed = _allowed()
    if cores_here() is None and len(allowed) >= (os.cpu_count() or 1):
        return None
    return len({_physical(core) for core in allowed})


def child_environment() -> dict[str, str]:
    """Return the environment variables for a process that this thread starts, which inherits its cores.

    If cores were chosen, OpenMP's variables that bind threads to cores are removed, and with them OMP_NUM_THREADS.
    """
    bound = cores_here() is not None and not os.environ.keys().isdisjoint(_BINDING)
    removed = (*_BINDING, "OMP_NUM_THREADS") if bound else ()
    return {name: value for name, value in os.environ.items() if name not in removed}


@cache
def _physical(core: int) -> frozenset[int]:
    """Return the hardware threads of a core's physical core, including the core itself."""
    try:
        listed = parse_cores((_TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list").read_text())
    except (OSError, ValueError):  # an offline core, or a system without this file
        listed = ALL
    return frozenset({core}).union(() if listed == ALL else listed)


def _allowed(thread: int = 0) -> frozenset[int]:
    """Return the cores that a thread may run on; by default this thread."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(thread))
    return frozenset(range(os.cpu_count() or 1))


def _move(cores: frozenset[int]) -> None:
    """Pin this thread to those of the cores that exist."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):
            os.sched_setaffinity(0, cores)
