"""Sends a child's log records through a pipe, one line of JSON each, and reads what the child logs and prints.

A device's process runs vendor code. Everything that it writes is bounded here: the fields, their lengths, the names of
loggers, and the lines per second. This process does not format any of it.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

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
"""Lines at once, and lines per second, that are logged; further ones are counted."""
_PAUSE = 0.01
"""Seconds without reading after a chunk with lines that were dropped; the process that writes them has to wait."""
_REPORTING = 1.0
_FORMATTER = logging.Formatter()


class _Record(BaseModel):
    """The fields of a log record that are sent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(max_length=_LONGEST_NAME)
    level: int = Field(ge=0, le=100)
    text: str = Field(max_length=_LONGEST_TEXT)
    path: str = Field(max_length=_LONGEST_TEXT)
    line: int = Field(ge=0, lt=2**31)
    function: str = Field(max_length=_LONGEST_NAME)
    process: int = Field(ge=0, lt=2**31)


class RecordSender(logging.Handler):
    """The child's only log handler: sends each record to the parent, whose logging configuration applies."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record with its formatted message, without the attributes that `extra` added."""
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


class _Lines:
    """Splits what a pipe yields into lines, and lines of more than `longest` bytes into pieces."""

    def __init__(self, longest: int, log: Callable[[bytes], None], shown: Callable[[bytes], str]) -> None:
        self.longest, self.log, self.shown = longest, log, shown
        self._rest = bytearray()

    def split(self, data: bytes) -> Iterator[bytes]:
        """Yield the complete lines; for empty `data`, which is the end, also the incomplete last one."""
        self._rest += data
        while self._rest:
            end = self._rest.find(b"\n", 0, self.longest) + 1 or self.longest
            if data and len(self._rest) < end:
                return
            yield bytes(self._rest[:end])
            del self._rest[:end]


class OutputReader:
    """Reads what a child prints and logs, in a thread, and passes it to this process's logging.

    Args:
        backend: Printed lines go to the logger `visionaccel.device.<backend>`, level INFO.
        printed: Read end of the pipe that is the child's stdout and stderr; this object closes it.
        records: Read end of the pipe of a `RecordSender`; this object closes it.
    """

    def __init__(self, backend: str, printed: int, records: int) -> None:
        self._logger = safe_logger(f"visionaccel.device.{backend}")
        self._tail: deque[tuple[Callable[[bytes], str], bytes]] = deque(maxlen=_TAIL)
        self._names: set[str] = set()
        self._allowance, self._filled = _BURST, time.monotonic()
        self._dropped, self._reported = 0, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(printed, records), name="visionaccel-output", daemon=True
        )
        try:
            self._thread.start()
        except BaseException:  # such as RuntimeError: no more threads can be started
            os.close(printed)
            os.close(records)
            raise

    def tail(self) -> tuple[str, ...]:
        """Return the last lines, printed or logged, oldest first."""
        found = []
        for shown, line in self._tail.copy():
            with suppress(ValueError):  # not a record
                found.append(one_line(shown(line), _LONGEST_TEXT))
        return tuple(found)

    def close(self, seconds: float = 0.5) -> None:
        """Read what is left, for at most that many seconds, and close the pipes.

        A process that vendor code started may keep a pipe open, so its end may never come.
        """
        self._thread.join(seconds)
        self._ended.set()

    def _read(self, printed: int, records: int) -> None:
        """Read both pipes until they end or `close` gives up, and close them."""
        sources = {  # printed lines come last, because a crash prints the lines that matter most in the tail
            records: _Lines(_LONGEST_RECORD, self._log_record, _shown_record),
            printed: _Lines(_LONGEST_LINE, self._log_line, _shown_line),
        }
        with selectors.PollSelector() as pipes:
            for fd, source in sources.items():
                pipes.register(fd, selectors.EVENT_READ, source)
            while pipes.get_map() and not self._ended.is_set():
                for key, _ in pipes.select(_REPORTING):
                    if data := os.read(key.fd, _CHUNK):
                        self._handle(key.data, data)
                    else:
                        pipes.unregister(key.fd)
                self._report()
        for fd, source in sources.items():
            self._handle(source, b"")
            os.close(fd)
        self._report(0.0)

    def _handle(self, source: _Lines, data: bytes) -> None:
        """Log the lines, as many as may be logged, and slow down a child that writes too many."""
        dropped = self._dropped
        for line in source.split(data):
            self._tail.append((source.shown, line))
            if not self._may_log():
                continue
            try:
                source.log(line)
            except Exception:  # an invalid line, or a user's log handler that raises: the child must not wait for it
                with suppress(Exception):  # that handler again
                    self._logger.debug("A line of the device's process could not be logged.", exc_info=True)
        if self._dropped > dropped:
            time.sleep(_PAUSE)

    def _may_log(self) -> bool:
        """Return whether one more line may be logged now; counts it if not."""
        now = time.monotonic()
        self._allowance = min(_BURST, self._allowance + _RATE * (now - self._filled))
        self._filled = now
        allowed = self._allowance >= 1
        self._allowance -= allowed
        self._dropped += not allowed
        return allowed

    def _report(self, seconds: float = _REPORTING) -> None:
        """Log how many lines were dropped, unless that was done less than some seconds ago."""
        now = time.monotonic()
        if not self._dropped or now - self._reported < seconds:
            return
        dropped, self._dropped, self._reported = self._dropped, 0, now
        with suppress(Exception):  # a user's log handler that raises
            self._logger.warning("%d lines were not logged: the device's process writes too many.", dropped)

    def _log_line(self, line: bytes) -> None:
        self._logger.info("%s", _shown_line(line))

    def _log_record(self, line: bytes) -> None:
        sent = _Record.model_validate_json(line)
        logger = self._named(sent.name)
        if logger.isEnabledFor(sent.level):
            # Has these fields only. A message without arguments is not formatted.
            record = logging.LogRecord(
                logger.name, sent.level, sent.path, sent.line, lines(sent.text), None, None, sent.function
            )
            record.process = sent.process
            logger.handle(record)

    def _named(self, name: str) -> logging.Logger:
        """Return the logger of that name, or the backend's after too many names, because loggers are never freed."""
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
