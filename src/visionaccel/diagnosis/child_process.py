"""A look in a process of its own: what it answers, or how it ended without an answer.

The answer comes in a file, as vendors' libraries print what they like to stdout and stderr. What is printed is read
and forgotten but for its end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from visionaccel.backends import Finding
from visionaccel.diagnosis.findings import as_finding, printable

__all__ = ["ask_child"]

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


def ask_child(
    name: str, module: str, arguments: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
) -> list[Finding]:
    """Run a module in a child process, and take its findings.

    Args:
        name: What is looked at, for findings about the child itself.
        module: Run as `python -m`; it gets the answer's file, the limit and the arguments, see `child_main`.
        arguments: What else it gets.
        limit: Seconds until it is ended.
        environment: Its environment; None for this process's.

    Returns:
        The child's findings, and one more if it did not end as it should.
    """
    with tempfile.TemporaryDirectory(prefix="visionaccel-doctor-") as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-P", "-m", module, str(answer), f"{limit:g}", *arguments]
        try:
            end = _run(command, limit, environment)
        except OSError as error:
            return [Finding(name, "failure", f"a process to look in cannot be started: {error}", "Free memory.")]
        return _findings(name, answer, end, limit)


def _run(command: list[str], limit: float, environment: Mapping[str, str] | None) -> _End:
    process = subprocess.Popen(  # noqa: S603
        command,
        env=None if environment is None else dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    assert process.stdout is not None
    tail = bytearray()
    reader = threading.Thread(target=_keep_end, args=(process.stdout, tail), daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        # Its whole group: what it started in turn must not stay behind either.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(_READER_SECONDS)
    lines = bytes(tail).decode(errors="replace").strip().splitlines()
    return _End(status, printable(lines[-1])[:_SHOWN] if lines else "")


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
        return [Finding(name, "failure", f"its answer cannot be read: {printable(str(error))}", _fix(end))]
    if end.status != 0:
        detail = f"it answered, and then {_how(end, limit)}{_last_words(end)}"
        found.append(Finding(f"end of {name}", "warning", detail, _fix(end)))
    return found


def _read(answer: Path) -> list[Any]:
    with answer.open("rb") as file:
        data = file.read(_MOST_ANSWER + 1)
    rows = json.loads(data) if len(data) <= _MOST_ANSWER else None
    if not isinstance(rows, list):
        raise ValueError("it is no list of findings")
    return rows


def _how(end: _End, limit: float) -> str:
    if end.status is None:
        return f"it did not end within {limit:g} s and was ended"
    if end.status >= 0:
        return f"its process ended with status {end.status}"
    try:
        name = signal.Signals(-end.status).name
    except ValueError:
        name = f"signal {-end.status}"
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
