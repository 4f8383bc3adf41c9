"""Nothing is left behind by a process that is killed: neither the processes that it started nor its temporary folders.

A process cannot tidy when SIGKILL ends it. So while there is something to tidy, this file runs as a second process, the
watcher: it reads from a pipe what there is, and removes what is left when the pipe ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["guarded_folder", "guarded_group", "temporary_folder"]

_GRACE = 10.0
"""Seconds that process groups have to end by themselves after SIGTERM."""


class _Watcher:
    """The watcher's process, which runs while something is registered. Used by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._known: set[tuple[str, str]] = set()

    def add(self, kind: str, value: str) -> None:
        with self._lock:
            if self._owner != os.getpid():  # a fork has a copy of what is not its own
                self._process, self._owner, self._known = None, os.getpid(), set()
            if self._process is None:
                self._process = subprocess.Popen(  # noqa: S603 - this interpreter and this file
                    [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, process_group=0
                )
            self._known.add((kind, value))
            self._tell(True, kind, value)

    def take_back(self, kind: str, value: str) -> None:
        with self._lock:
            if self._owner != os.getpid() or self._process is None or (kind, value) not in self._known:
                return
            self._known.discard((kind, value))
            self._tell(False, kind, value)
            if not self._known:
                process, self._process = self._process, None
                assert process.stdin is not None
                with suppress(OSError):
                    process.stdin.close()
                process.wait()

    def _tell(self, there: bool, kind: str, value: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(OSError):  # the watcher itself was killed, and work goes on without one
            self._process.stdin.write(json.dumps([there, kind, value]).encode() + b"\n")
            self._process.stdin.flush()


_WATCHER = _Watcher()


@contextmanager
def guarded_group(leader: int) -> Iterator[None]:
    """Have a process group ended should this process be killed in the context: SIGTERM, and SIGKILL after ten seconds.

    Args:
        leader: The process that leads the group, a child of this process.
    """
    value = f"{leader} {_started(leader)}"
    _WATCHER.add("group", value)
    try:
        yield
    finally:
        _WATCHER.take_back("group", value)


@contextmanager
def guarded_folder(folder: Path) -> Iterator[None]:
    """Have a folder removed should this process be killed while the context lasts. Otherwise it stays as it is."""
    path = str(folder.absolute())
    _WATCHER.add("folder", path)
    try:
        yield
    finally:
        _WATCHER.take_back("folder", path)


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder that is gone after the context, however it ends.

    Args:
        prefix: What its name begins with.
        parent: Where it is made; by default among the system's temporary folders.
    """
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as made, guarded_folder(Path(made)):
        yield Path(made)


def _started(pid: int) -> str:
    """When a process started, in the system's ticks: its number alone may be another's by then. Empty if unknown."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _watch() -> None:
    """The watcher: read what is to be tidied until the pipe ends, then tidy it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    left: dict[tuple[str, str], None] = {}
    for line in sys.stdin.buffer:
        if not line.endswith(b"\n"):
            break
        there, kind, value = json.loads(line)
        if there:
            left[kind, value] = None
        else:
            left.pop((kind, value), None)
    groups = [value.split() for kind, value in left if kind == "group"]
    leaders = [int(leader) for leader, *started in groups if _started(int(leader)) in ("", *started)]
    until = time.monotonic() + _GRACE
    _signal(leaders, signal.SIGTERM)
    while time.monotonic() < until and _signal(leaders, 0):
        time.sleep(0.05)
    _signal(leaders, signal.SIGKILL)
    for kind, value in left:
        if kind == "folder":
            shutil.rmtree(value, ignore_errors=True)


def _signal(leaders: list[int], number: int) -> bool:
    """Send a signal to groups; whether one of them is there."""
    found = False
    for leader in leaders:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, number)
            found = True
    return found


if __name__ == "__main__":
    _watch()
