"""Runs checks in a child process and returns what they find, or how the process ended without an answer.

The answer comes in a file, because vendor libraries may print anything to stdout and stderr.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Self, get_args

from visionaccel.backends import Finding
from visionaccel.backends.spec import Status
from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.child_groups import ChildGroup, how_it_ended, signal_name
from visionaccel.core.orphans import temporary_folder
from visionaccel.core.safe_text import one_line

_MOST_ANSWER = 4 * 2**20
_KEPT = 4096
_SHOWN = 200
_READER_SECONDS = 1.0
_WORDS = {"SIGSEGV": "a segmentation fault", "SIGABRT": "an abort", "SIGKILL": "killed, perhaps because memory ran out"}


class CheckProcess:
    """A child process that runs the checks of a module. Leaving the context ends it.

    Args:
        name: What is checked; the name of findings about the child itself.
        module: Run as `python -m MODULE FILE LIMIT ARGUMENTS...`; it writes its answer with `write_findings`.
        arguments: Further arguments of the module.
        limit: Seconds from now until the child is killed.
        environment: Its environment; None for this process's.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        limit: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name, self._limit, self._until = name, limit, time.monotonic() + limit
        self._tail = bytearray()
        self._child: ChildGroup | None = None
        self._folder, self._running = ExitStack(), ExitStack()
        try:
            self._answer = self._folder.enter_context(temporary_folder("visionaccel-doctor-")) / "answer.json"
            self._child = ChildGroup(
                [sys.executable, "-P", "-m", module, str(self._answer), f"{limit:g}", *arguments],
                environment=environment,
                output=subprocess.PIPE,
            )
        except OSError as error:
            self._problem = str(error)
            return
        self._running.callback(self._child.end)  # only once: it takes seconds if the child is stuck in a driver
        printed = self._child.printed
        assert printed is not None
        self._reader = threading.Thread(target=_keep_end, args=(printed, self._tail), daemon=True)
        try:
            self._reader.start()
        except RuntimeError as error:  # no more threads can be started
            self._running.close()
            printed.close()
            self._child, self._problem = None, str(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()
        self._folder.close()

    def findings(self) -> list[Finding]:
        """Wait for the child and return its findings, and one more if the child failed or ran out of time."""
        if self._child is None:
            detail = f"no process can be started for the checks: {self._problem}"
            return [Finding(self._name, "failure", detail, "Check the limits of this machine and its user.")]
        in_time = self._child.exits_within(self._until - time.monotonic())
        self._running.close()
        self._reader.join(_READER_SECONDS)
        how, fix = _ending(self._child.status if in_time else None, self._limit)
        lines = bytes(self._tail).decode(errors="replace").strip().splitlines()
        printed = f"; it last printed: {one_line(lines[-1])[:_SHOWN]}" if lines else ""
        try:
            rows = json.loads(read_bounded(self._answer, _MOST_ANSWER))
            if not isinstance(rows, list):
                raise ValueError("it is not a list of findings")
            found = [as_finding(row) for row in rows]
        except FileNotFoundError:
            return [Finding(self._name, "failure", f"{how} before it answered{printed}", fix)]
        except (OSError, ValueError, RecursionError) as error:
            return [Finding(self._name, "failure", f"its answer cannot be read: {one_line(str(error))}", fix)]
        if not in_time or self._child.status != 0:
            found.append(Finding(f"end of {self._name}", "warning", f"it answered, but then {how}{printed}", fix))
        return found


def _keep_end(stream: IO[bytes], tail: bytearray) -> None:
    while piece := os.read(stream.fileno(), 65536):
        tail += piece
        del tail[:-_KEPT]
    stream.close()


def _ending(status: int | None, limit: float) -> tuple[str, str]:
    """Describe how a child ended (None: it ran out of time) and what to do about it."""
    if status is None:
        fix = "Check its driver and the kernel's log (dmesg). If it is only slow, pass a longer --limit."
        return f"it did not end within {limit:g} s and was killed", fix
    fix = "Reinstall it and its vendor's runtime, or report this to its authors; the kernel's log (dmesg) may say more."
    if status >= 0:
        return f"its process {how_it_ended(status)}", fix
    name = signal_name(-status)
    words = f" ({_WORDS[name]})" if name in _WORDS else ""
    return f"its process died of {name}{words}", fix


def give_up_after(seconds: float) -> None:
    """Have the system end this process soon after that time, in case its parent is gone; disable core files."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(int(seconds) + 5)


def write_findings(file: str, findings: Sequence[Finding]) -> None:
    """Write a child's answer, atomically."""
    rows = [asdict(finding) for finding in findings]
    unfinished = Path(f"{file}.part")
    unfinished.write_text(json.dumps(rows, default=str), encoding="utf-8")
    unfinished.replace(file)


def as_finding(row: Any) -> Finding:
    """Check an untrusted `Finding`, or mapping of its fields, and make it printable; ValueError if it is neither."""
    if isinstance(row, Finding):
        row = asdict(row)
    if not isinstance(row, Mapping) or row.get("status") not in get_args(Status):
        raise ValueError(f"{one_line(repr(row))} is not a finding")
    name, detail, fix = (one_line(str(row.get(field, ""))) for field in ("name", "detail", "fix"))
    return Finding(name, row["status"], detail, fix)
