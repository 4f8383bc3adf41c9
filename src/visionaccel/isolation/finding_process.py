"""A look in a child process: what it answers, or how it ended without an answer.

The answer comes in a file, as vendors' libraries print what they like to stdout and stderr. What is printed is read
and forgotten but for its end.
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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from visionaccel.backends import Finding
from visionaccel.backends.spec import Status
from visionaccel.core.child_groups import ChildGroup, how_it_ended, signal_name
from visionaccel.core.orphans import temporary_folder
from visionaccel.core.safe_text import one_line

_STATUSES: tuple[Status, ...] = ("pass", "warning", "failure")
_MOST_ANSWER = 4 * 2**20
_KEPT = 4096
_SHOWN = 200
_READER_SECONDS = 1.0
_WORDS = {"SIGSEGV": "a segmentation fault", "SIGABRT": "an abort", "SIGKILL": "killed, as where memory runs out"}


@dataclass(frozen=True, slots=True)
class _End:
    """How a child ended: its exit status, or None where its time was over; and the last that it printed."""

    status: int | None
    printed: str


class FindingProcess:
    """A module that runs in a child process, and answers with findings. Leaving the context ends it.

    Args:
        name: What is looked at, for findings about the child itself.
        module: Run as `python -m`; it gets the answer's file, the limit and the arguments, see `answer_with`.
        arguments: What else it gets.
        limit: Seconds from now until it is ended.
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
        self._name, self._limit, self._started = name, limit, time.monotonic()
        self._tail = bytearray()
        self._child: ChildGroup | None = None
        self._problem, self._ended = "", False
        self._left = ExitStack()
        try:
            self._answer = self._left.enter_context(temporary_folder("visionaccel-doctor-")) / "answer.json"
            self._child = ChildGroup(
                [sys.executable, "-P", "-m", module, str(self._answer), f"{limit:g}", *arguments],
                environment=environment,
                output=subprocess.PIPE,
            )
        except OSError as error:
            self._problem = str(error)
            return
        assert self._child.printed is not None
        self._reader = threading.Thread(target=_keep_end, args=(self._child.printed, self._tail), daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._left.close()

    def findings(self) -> list[Finding]:
        """Its findings, once it has ended or its time is over; and one more if it did not end as it should."""
        if self._child is None:
            detail = f"a process to look in cannot be started: {self._problem}"
            return [Finding(self._name, "failure", detail, "Look at the limits of this machine and its user.")]
        ended = self._child.exits_within(self._started + self._limit - time.monotonic())
        self._end()
        status = self._child.status if ended else None
        lines = bytes(self._tail).decode(errors="replace").strip().splitlines()
        end = _End(status, one_line(lines[-1])[:_SHOWN] if lines else "")
        return _findings(self._name, self._answer, end, self._limit)

    def _end(self) -> None:
        """End its whole group: what it started in turn must not stay behind either."""
        if self._child is None or self._ended:
            return
        self._ended = True
        self._child.end()
        self._reader.join(_READER_SECONDS)


def _keep_end(stream: IO[bytes], tail: bytearray) -> None:
    while piece := os.read(stream.fileno(), 65536):
        tail += piece
        del tail[:-_KEPT]
    stream.close()


def _findings(name: str, answer: Path, end: _End, limit: float) -> list[Finding]:
    try:
        found = [as_finding(row) for row in _read(answer)]
    except FileNotFoundError:
        return [Finding(name, "failure", f"{_how(end, limit)} before it answered{_last_words(end)}", _fix(end))]
    except (OSError, ValueError, RecursionError) as error:
        return [Finding(name, "failure", f"its answer cannot be read: {one_line(str(error))}", _fix(end))]
    if end.status != 0:
        detail = f"it answered, and then {_how(end, limit)}{_last_words(end)}"
        found.append(Finding(f"end of {name}", "warning", detail, _fix(end)))
    return found


def _read(answer: Path) -> list[Any]:
    with answer.open("rb") as file:
        data = file.read(_MOST_ANSWER + 1)
    rows = json.loads(data) if len(data) <= _MOST_ANSWER else None
    if not isinstance(rows, list):
        raise ValueError("it is not a list of findings")
    return rows


def _how(end: _End, limit: float) -> str:
    if end.status is None:
        return f"it did not end within {limit:g} s and was ended"
    if end.status >= 0:
        return f"its process {how_it_ended(end.status)}"
    name = signal_name(-end.status)
    words = _WORDS.get(name)
    return f"its process died of {name}" + (f" ({words})" if words else "")


def _last_words(end: _End) -> str:
    return f"; it last printed: {end.printed}" if end.printed else ""


def _fix(end: _End) -> str:
    if end.status is None:
        return "Look at its driver, and at the kernel's log (dmesg); if it only is slow, pass a longer --limit."
    return "Reinstall it and its vendor's runtime, or tell its authors; the kernel's log (dmesg) may say more."


def give_up_after(seconds: float) -> None:
    """Have the system end this process, should its parent be gone by then; and leave no core file behind."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(int(seconds) + 5)


def answer_with(file: str, findings: Sequence[Finding]) -> None:
    """Write a child's answer, all at once."""
    rows = [{"name": f.name, "status": f.status, "detail": f.detail, "fix": f.fix} for f in findings]
    unfinished = Path(f"{file}.part")
    unfinished.write_text(json.dumps(rows, default=str), encoding="utf-8")
    unfinished.replace(file)


def as_finding(row: Any) -> Finding:
    """Check what a child process or a plug-in returned as a finding, and make its text safe to print.

    Args:
        row: A `Finding`, or a mapping with `name`, `status`, `detail` and `fix`; untrusted.

    Raises:
        ValueError: If it is not a finding.
    """
    if isinstance(row, Finding):
        row = {"name": row.name, "status": row.status, "detail": row.detail, "fix": row.fix}
    if not isinstance(row, Mapping) or row.get("status") not in _STATUSES:
        raise ValueError(f"{one_line(repr(row))} is not a finding")
    name, detail, fix = (one_line(str(row.get(field, ""))) for field in ("name", "detail", "fix"))
    return Finding(name, row["status"], detail, fix)
