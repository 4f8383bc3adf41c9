"""Log records that cross a pipe, one line of JSON each, and the pipes' reader.

A device's process runs the vendor's code. What it writes is bounded here in every way: the fields, their lengths, the
names of loggers, and the lines in a second. Nothing of it is formatted by this process.
"""

from __future__ import annotations

import io
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from visionaccel.core.safe_text import lines, one_line, safe_logger

_TAIL = 20
_LONGEST_LINE = 16_384
_LONGEST_TEXT = 4096
_LONGEST_NAME = 200
_LONGEST_RECORD = 65_536
_CHUNK = 65_536
_MOST_LOGGERS = 256
_BURST, _RATE = 1000.0, 200.0
"""Lines at once, and lines in a second, that are logged; further ones are counted."""
_PAUSE = 0.01
"""Seconds without reading after each chunk that was too much: the process that writes it waits for this one."""
_REPORTING = 1.0
_FORMATTER = logging.Formatter()


class _Record(BaseModel):
    """What crosses the pipe of a record."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(max_length=_LONGEST_NAME)
    level: int = Field(ge=0, le=100)
    text: str = Field(max_length=_LONGEST_TEXT)
    path: str = Field(max_length=_LONGEST_TEXT)
    line: int = Field(ge=0, lt=2**31)
    function: str = Field(max_length=_LONGEST_NAME)
    process: int = Field(ge=0, lt=2**31)


class RecordSender(logging.Handler):
    """The child's only log handler: sends each record to the parent, which knows what to do with it."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, its message formatted. What `extra` added stays here."""
        try:
            text = _FORMATTER.format(record)[:_LONGEST_TEXT]
            sent = _Record(
                name=record.name[:_LONGEST_NAME],
                level=min(max(record.levelno, 0), 100),
                text=text.encode("utf-8", "backslashreplace").decode()[:_LONGEST_TEXT],
                path=record.pathname[:_LONGEST_TEXT],
                line=record.lineno,
                function=(record.funcName or "")[:_LONGEST_NAME],
                process=record.process or 0,
            )
            rest = sent.model_dump_json().encode() + b"\n"
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except Exception:
            self.handleError(record)


class _Pipe(io.FileIO):
    """The read end of a pipe, which also ends once `ended` is set: a process that is not the child may hold it open."""

    def __init__(self, fd: int, ended: threading.Event, idle: Callable[[], None]) -> None:
        super().__init__(fd)
        self._ended, self._idle = ended, idle
        self._readable = select.poll()
        self._readable.register(fd, select.POLLIN)

    def readinto(self, buffer: Any) -> int:
        while not self._ended.is_set():
            if self._readable.poll(_REPORTING * 1000):
                return super().readinto(buffer) or 0
            self._idle()
        return 0


class OutputReader:
    """Reads what a child prints and logs, in a thread for each, and hands it to this process's logging.

    Args:
        backend: Printed lines go to the logger `visionaccel.device.<backend>`, level INFO.
        printed: Read end of the pipe that is the child's stdout and stderr; it belongs to this object.
        records: Read end of the pipe of a `RecordSender`; it belongs to this object.
    """

    def __init__(self, backend: str, printed: int, records: int) -> None:
        self._logger = safe_logger(f"visionaccel.device.{backend}")
        self._tail: deque[tuple[Callable[[bytes], str], bytes]] = deque(maxlen=_TAIL)
        self._names: set[str] = set()
        self._lock = threading.Lock()
        self._allowance, self._filled = _BURST, time.monotonic()
        self._dropped, self._reported = 0, time.monotonic()
        self._ended = threading.Event()
        pipes = [_Pipe(fd, self._ended, self._report) for fd in (printed, records)]
        ways = (
            (pipes[0], _LONGEST_LINE, self._log_line, _shown_line),
            (pipes[1], _LONGEST_RECORD, self._log_record, _shown_record),
        )
        self._threads = [
            threading.Thread(target=self._read, args=way, name="visionaccel-output", daemon=True) for way in ways
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # such as for want of threads
            self._ended.set()
            for pipe, thread in zip(pipes, self._threads, strict=True):
                if thread.ident is None:
                    pipe.close()
            raise

    def tail(self) -> tuple[str, ...]:
        """The last lines, printed or logged, oldest first."""
        found = []
        for shown, line in self._tail.copy():
            with suppress(ValueError):  # not a record
                found.append(one_line(shown(line), _LONGEST_TEXT))
        return tuple(found)

    def close(self, seconds: float = 0.5) -> None:
        """Read what is left, for that long at most, and have the pipes closed.

        A process that the vendor's code started may keep one open, so its end cannot be waited for.
        """
        limit = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))
        self._ended.set()

    def _read(self, pipe: _Pipe, longest: int, log: Callable[[bytes], None], shown: Callable[[bytes], str]) -> None:
        too_much = 0
        with io.BufferedReader(pipe, _CHUNK) as reader:
            while line := reader.readline(longest):
                self._tail.append((shown, line))
                if self._may_log():
                    try:
                        log(line)
                    except Exception:  # A broken line, or a user's broken log handler: the child must not wait for it.
                        self._logger.debug("A line of the device's process could not be logged.", exc_info=True)
                else:
                    too_much += len(line)
                if too_much > _CHUNK:
                    time.sleep(_PAUSE)
                    too_much = 0
                self._report()
        self._report(0.0)

    def _may_log(self) -> bool:
        """Whether one more line may be logged now; counts it if not."""
        with self._lock:
            now = time.monotonic()
            self._allowance = min(_BURST, self._allowance + _RATE * (now - self._filled))
            self._filled = now
            allowed = self._allowance >= 1
            self._allowance -= allowed
            self._dropped += not allowed
            return allowed

    def _report(self, seconds: float = _REPORTING) -> None:
        """Log how many lines were not, unless that was done less than some seconds ago."""
        with self._lock:
            now = time.monotonic()
            if not self._dropped or now - self._reported < seconds:
                return
            dropped, self._dropped, self._reported = self._dropped, 0, now
        with suppress(Exception):  # a user's broken log handler
            self._logger.warning("%d lines were not logged: the device's process writes too many.", dropped)

    def _log_line(self, line: bytes) -> None:
        self._logger.info("%s", _shown_line(line))

    def _log_record(self, line: bytes) -> None:
        sent = _Record.model_validate_json(line)
        logger = self._named(sent.name)
        if logger.isEnabledFor(sent.level):
            # Made here of these fields alone. Without arguments, a message is not formatted.
            record = logging.LogRecord(
                logger.name, sent.level, sent.path, sent.line, lines(sent.text), None, None, sent.function
            )
            record.process = sent.process
            logger.handle(record)

    def _named(self, name: str) -> logging.Logger:
        """The logger of that name; for too many names the backend's, because loggers are never given back."""
        if name not in self._names:
            if len(self._names) >= _MOST_LOGGERS or name.count(".") >= _TAIL:
                return self._logger
            self._names.add(name)
        return logging.getLogger(name)


def _shown_line(line: bytes) -> str:
    return line.decode(errors="backslashreplace").rstrip("\r\n")


def _shown_record(line: bytes) -> str:
    sent = _Record.model_validate_json(line)
    return f"{logging.getLevelName(sent.level)} {sent.name}: {sent.text}"
