"""Cleans up after this process if it is killed: ends its child processes and removes its temporary folders.

A process cannot clean up when SIGKILL ends it. So while there is something to clean up, this file runs as a second
process, the watcher: it reads a list of items from a pipe, and when the pipe closes, ends or removes those left.
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
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

_GRACE = 10.0
"""Seconds that process groups get to end by themselves after SIGTERM."""


class _Watcher:
    """Starts the watcher's process, which runs while something is registered. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._items: list[tuple[str, str]] = []

    @contextmanager
    def guarding(self, kind: str, value: str) -> Iterator[None]:
        item = (kind, value)
        with self._lock:
            if self._owner != os.getpid():  # this is a fork, and these belong to its parent
                self._process, self._owner, self._items = None, os.getpid(), []
            if self._process is None:
                self._process = subprocess.Popen(  # noqa: S603 - this interpreter and this file
                    [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, process_group=0
                )
            self._items.append(item)
            self._send(self._process)
        try:
            yield
        finally:
            with self._lock:
                if self._owner == os.getpid() and self._process is not None and item in self._items:
                    self._items.remove(item)
                    self._send(self._process)

    def _send(self, process: subprocess.Popen[bytes]) -> None:
        """Send the whole list of items, and end the watcher if it is empty."""
        assert process.stdin is not None
        with suppress(OSError):  # the watcher itself was killed: continue without it
            process.stdin.write(json.dumps(self._items).encode() + b"\n")
            process.stdin.flush()
        if not self._items:
            self._process = None
            with suppress(OSError):
                process.stdin.close()
            process.wait()


_WATCHER = _Watcher()


def guarded_group(leader: int) -> AbstractContextManager[None]:
    """End a child's process group if this process is killed in the context: SIGTERM, and SIGKILL 10 s later."""
    return _WATCHER.guarding("group", f"{leader} {_started(leader)}")


def guarded_folder(folder: Path) -> AbstractContextManager[None]:
    """Remove a folder if this process is killed in the context. Otherwise the folder is left alone."""
    return _WATCHER.guarding("folder", str(folder.absolute()))


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder in `parent`, by default the system's temporary folder, and remove it after the context."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as made, guarded_folder(Path(made)):
        yield Path(made)


def _started(pid: int) -> str:
    """Return when a process started, in clock ticks, because process ids are reused; empty if unknown."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _watch() -> None:
    """Read lists of items until the pipe closes, then end or remove the items of the last list."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    items: list[tuple[str, str]] = []
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):  # otherwise the process was killed while it wrote
            items = json.loads(line)
    groups = [value.split() for kind, value in items if kind == "group"]
    leaders = [int(leader) for leader, *started in groups if _started(int(leader)) in ("", *started)]
    until = time.monotonic() + _GRACE
    _signal(leaders, signal.SIGTERM)
    while time.monotonic() < until and _signal(leaders, 0):
        time.sleep(0.05)
    _signal(leaders, signal.SIGKILL)
    for kind, value in items:
        if kind == "folder":
            shutil.rmtree(value, ignore_errors=True)


def _signal(leaders: list[int], number: int) -> bool:
    """Send a signal to process groups; return whether any of them still exists."""
    found = False
    for leader in leaders:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, number)
            found = True
    return found


if __name__ == "__main__":
    _watch()
