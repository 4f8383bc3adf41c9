"""The log of encode times (`VISIONACCEL_TIMING`) and the timeline (`VISIONACCEL_TRACE`)."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from visionaccel.backends import EncodeReport, default_registry, hookimpl
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import ConfigurationError

logger = safe_logger(__name__)

_T = TypeVar("_T")
_owners: dict[str, int] = {}
_installing = [threading.RLock()]
os.register_at_fork(after_in_child=lambda: _installing.__setitem__(0, threading.RLock()))

Category = Literal["queue", "device", "host", "decode", "processor"]

TIMING_PREFIX = "visionaccel encode "
"""The start of a timing line; a JSON object follows."""


def installed(kind: type[_T], make: Callable[[], _T]) -> _T:
    """Return this process's observer of a class; make and register one on the first call.

    A forked process makes a new one: its parent's has counts, and locks that the parent's threads may hold.
    """
    plugins, name = default_registry().plugins, kind.__name__
    with _installing[0]:
        found = plugins.get_plugin(name)
        if isinstance(found, kind) and _owners.get(name) == os.getpid():
            return found
        if found is not None:
            plugins.unregister(found)
        made = make()
        plugins.register(made, name)
        _owners[name] = os.getpid()
        return made


class TimingLog:
    """Logs one line for each encode: sizes, milliseconds of each part, and the transfers' bandwidth."""

    @classmethod
    def install(cls) -> None:
        """Start logging in this process, once."""
        installed(cls, cls)

    @hookimpl
    def visionaccel_encoded(self, report: EncodeReport) -> None:
        """Log one encode."""
        seconds = {
            "queue": report.queue_seconds,
            "check": report.check_seconds,
            "host_pre": report.prepare_seconds,
            "transfer_in": report.transfer_in_seconds,
            "device": report.device_seconds,
            "transfer_out": report.transfer_out_seconds,
            "host_post": report.finish_seconds,
        }
        line = {
            "backend": report.backend,
            "device": report.device,
            "purpose": report.purpose,
            "grids": [str(grid) for grid in report.grids],
            "patches": report.patches,
            "tokens": report.tokens,
            "ms": {part: round(1e3 * value, 3) for part, value in seconds.items() if value is not None},
            "bytes_in": report.bytes_in,
            "bytes_out": report.bytes_out,
            "gb_per_s_in": _bandwidth(report.bytes_in, report.transfer_in_seconds),
            "gb_per_s_out": _bandwidth(report.bytes_out, report.transfer_out_seconds),
        }
        logger.info("%s%s", TIMING_PREFIX, json.dumps(line))


def timed_encodes(log: str) -> list[dict[str, Any]]:
    """Return the timing lines of a log that belong to requests, in order, without canaries and shadows."""
    lines = [json.loads(line.partition(TIMING_PREFIX)[2]) for line in log.splitlines() if TIMING_PREFIX in line]
    return [line for line in lines if line["purpose"] == "request"]


def _bandwidth(size: int, seconds: float) -> float | None:
    """Return GB/s, or None if the session reported no transfer."""
    return round(size / seconds / 1e9, 3) if seconds > 0 else None


class TraceLog:
    """A timeline of encodes and steps in Chrome's trace format. Safe to use from several threads and processes.

    Every process of a server appends to one file, with times of one clock; slices in a lane never overlap. The JSON
    array is never closed, which the format allows.

    Args:
        path: The file, created if it does not exist.
        process: The process's name in the timeline; by default its multiprocessing name.

    Raises:
        ConfigurationError: If the file cannot be written.
    """

    def __init__(self, path: Path, process: str | None = None) -> None:
        import fcntl  # not every system has it, and importing this package must not fail there

        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_CREAT, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if os.fstat(self._file).st_size == 0:
                os.write(self._file, b"[\n")
            fcntl.flock(self._file, fcntl.LOCK_UN)
        except OSError as error:
            raise ConfigurationError(
                f"VISIONACCEL_TRACE: {path} cannot be written: {error}", hint="Choose a file in an existing folder."
            ) from error
        self._lock, self._full = threading.Lock(), False
        self._lanes: dict[str, dict[int, float]] = {}  # by name: each lane's number, and until when it is busy
        self._numbers = itertools.count(1)
        name = process or multiprocessing.current_process().name
        self._write({"ph": "M", "name": "process_name", "args": {"name": name}})

    @classmethod
    def install(cls, path: Path, process: str | None = None) -> TraceLog:
        """Start tracing in this process. Every caller gets the same object; a forked process gets a new one."""
        return installed(cls, lambda: cls(path, process))

    def slice(self, lane: str, category: Category, name: str, start: float, seconds: float, **details: Any) -> int:
        """Add a slice to the lane of a name, and return the lane's number, for `within`.

        A slice that overlaps another gets a second lane of the same name. `start` is on the clock of `time.monotonic`.
        Details are shown as JSON.
        """
        thread = self._lane(lane, start, start + seconds)
        self.within(thread, category, name, start, seconds, **details)
        return thread

    def within(self, thread: int, category: Category, name: str, start: float, seconds: float, **details: Any) -> None:
        """Add a part of a slice, in the slice's lane."""
        times = {"ts": round(1e6 * start, 1), "dur": round(1e6 * seconds, 1)}
        self._write({"ph": "X", "name": name, "cat": category, **times, "tid": thread, "args": details})

    @hookimpl
    def visionaccel_encoded(self, report: EncodeReport) -> None:
        """Add an encode with its parts, and its wait in the queue."""
        what = ", ".join(map(str, report.grids[:8]))
        host_before = report.check_seconds + report.prepare_seconds
        total = host_before + report.run_seconds + report.finish_seconds
        if report.queue_seconds:
            self.slice("queue", "queue", what, report.started - report.queue_seconds, report.queue_seconds)
        lane, name, at = f"device {report.backend} {report.device}", f"{report.purpose} {what}", report.started
        thread = self.slice(
            lane, "device", name, at, total, patches=report.patches, tokens=report.tokens, bytes_in=report.bytes_in,
            bytes_out=report.bytes_out,
        )  # fmt: skip
        # If an encode has several calls, their parts are shown as one.
        parts: tuple[tuple[str, Category, float], ...] = (
            ("host before", "host", host_before),
            ("transfer in", "host", report.transfer_in_seconds),
            ("compute", "device", report.device_seconds),
            ("transfer out", "host", report.transfer_out_seconds),
            ("host after", "host", report.finish_seconds),
        )
        for part, category, seconds in parts:
            if seconds > 0:
                self.within(thread, category, part, at, seconds)
            at += seconds

    def _lane(self, name: str, start: float, end: float) -> int:
        """Find or add a lane of this name that is free at the start, and return its number."""
        with self._lock:
            lanes = self._lanes.setdefault(name, {})
            free = next((number for number, busy_until in lanes.items() if busy_until <= start), None)
            number = next(self._numbers) if free is None else free
            lanes[number] = end
            shown = name if len(lanes) == 1 else f"{name} ({len(lanes)})"
        if free is None:
            self._write({"ph": "M", "name": "thread_name", "tid": number, "args": {"name": shown}})
        return number

    def _write(self, event: dict[str, Any]) -> None:
        if self._full:
            return
        try:
            line = json.dumps({**event, "pid": os.getpid()}) + ",\n"
            os.write(self._file, line.encode())  # one call, so that lines of several processes do not mix
        except OSError as error:
            self._full = True
            logger.error("The timeline stops here: %s", error)
