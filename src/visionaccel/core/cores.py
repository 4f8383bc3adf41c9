"""Which cores of the CPU an encoder's threads run on, next to what else computes on the machine.

The runtimes' pools inherit the cores of the thread that makes them, and their sizes follow from how many those are. So
an encoder is opened and called by threads that are pinned to its cores (`on_cores`).
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
"""Cores by their numbers, all that may be used, or None for those that nothing else is known to compute on."""

_MOST = 1 << 16
_BINDING = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_HW_SUBSET")
_BOUND_THREADS = "OMP_NUM_THREADS"
_TOPOLOGY = Path("/sys/devices/system/cpu")

_here = threading.local()


@dataclass(frozen=True, slots=True)
class Host:
    """The machine as an encoder finds it next to a language model.

    Attributes:
        usable: Cores that this process may use.
        taken: Cores that the language model computes on while images are encoded.
        why: The reason for that, as a clause.
    """

    usable: frozenset[int]
    taken: frozenset[int]
    why: str


class CoreChoice(NamedTuple):
    """The cores of an encoder and why, as a clause; None to leave threads where they are, and pools to the runtimes."""

    cores: frozenset[int] | None = None
    why: str = ""


def parse_cores(text: str) -> frozenset[int] | Literal["all"]:
    """Cores from a list of numbers and ranges such as `0-3,8`, or `all`; ValueError if it is neither."""
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
    """Cores as `parse_cores` reads them, such as `0-3,8`."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and runs[-1][-1] == core - 1:
            runs[-1][1:] = [core]
        else:
            runs.append([core])
    return ",".join("-".join(map(str, run)) for run in runs)


def process_cores(pid: int | None = None) -> frozenset[int]:
    """Cores that the main thread of a process may run on, by default this one; OSError if there is no such process."""
    return _allowed(os.getpid() if pid is None else pid)


def choose_cores(wanted: WantedCores, host: Host | None = None) -> CoreChoice:
    """The cores that a setting names, or those that the language model leaves, if any.

    Threads that share a physical core with the language model's slow it down, so such hardware threads are left to it
    too, as long as others remain.

    Args:
        wanted: The setting `cpu_cores`.
        host: What is known of the machine; None if no language model computes on it.

    Raises:
        SettingsError: If a core is named that this process may not use.
    """
    if wanted is None and host is None:
        return CoreChoice()
    usable = process_cores() if host is None else host.usable
    if wanted is None:
        assert host is not None
        apart = frozenset(core for core in usable if not _physical(core) & host.taken)
        left = apart or usable - host.taken
        return CoreChoice(left or usable, host.why if left else f"{host.why}, which leaves no other")
    if wanted == ALL:
        return CoreChoice(usable, "VISIONACCEL_CPU_CORES=all")
    shown = f"VISIONACCEL_CPU_CORES={shown_cores(wanted)}"
    if beyond := wanted - usable:
        raise SettingsError(
            f"{shown}: this process may not use {shown_cores(beyond)}, or there is no such core.",
            hint=f"It may use {shown_cores(usable)}.",
        )
    return CoreChoice(wanted, shown)


@contextmanager
def on_cores(cores: frozenset[int] | None, *, strict: bool = False) -> Iterator[None]:
    """Pin the current thread, and the threads it starts, to these cores; afterwards it runs where it ran before.

    Args:
        cores: The cores; None to change nothing.
        strict: Require all of them. Otherwise cores that the system has taken away are ignored.

    Raises:
        SettingsError: If strict, and the system does not give this thread each of them.
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
                f"threads of this process cannot be kept on cores {shown_cores(cores)}.",
                hint=f"They may run on {shown_cores(_allowed())}.",
            )
        yield
    finally:
        _here.cores = outer
        _move(before)


def cores_here() -> frozenset[int] | None:
    """The cores of the innermost `on_cores` of this thread, to open another thread's with; None outside."""
    return getattr(_here, "cores", None)


def thread_limit() -> int | None:
    """How many threads a pool that is made by this thread should have: one for each core that it may run on.

    Hardware threads of one core count once. None where this thread may run everywhere and its cores were not chosen:
    then the runtime's own choice is as good.
    """
    allowed = _allowed()
    if cores_here() is None and len(allowed) >= (os.cpu_count() or 1):
        return None
    return len({_physical(core) for core in allowed})


def child_environment() -> dict[str, str]:
    """The environment for a process that this thread starts, which inherits its cores.

    Where they were chosen, it lacks OpenMP's variables that bind threads to other cores, and their number of threads.
    """
    environment = dict(os.environ)
    if cores_here() is not None and not environment.keys().isdisjoint(_BINDING):
        for name in (*_BINDING, _BOUND_THREADS):
            environment.pop(name, None)
    return environment


@cache
def _physical(core: int) -> frozenset[int]:
    """The hardware threads of a core's physical core, itself included."""
    try:
        listed = (_TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
        found = parse_cores(listed)
    except (OSError, ValueError):  # offline, or a system that does not tell
        found = frozenset()
    return frozenset({core}) if found == ALL else frozenset({core}) | found


def _allowed(thread: int = 0) -> frozenset[int]:
    """Cores that a thread may run on; by default this one."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(thread))
    return frozenset(range(os.cpu_count() or 1))


def _move(cores: frozenset[int]) -> None:
    """Pin this thread to those of the cores that exist."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):
            os.sched_setaffinity(0, cores)
