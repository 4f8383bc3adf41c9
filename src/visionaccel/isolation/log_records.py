"""Log records that cross a pipe, one line of JSON each, and the pipes' reader.

A device's process runs the vendor's code. What it writes is bounded here in every way: the fields, their lengths, the
names of loggers, and the lines in a second. Nothing of it is formatted by this process.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
import traceback
from collections import deque

from pydantic import BaseModel, ConfigDict, Field

from visionaccel.core.safe_text import lines, one_line, safe_logger

_TAIL = 20
_LONGEST_LINE = 16_384
_LONGEST_TEXT = 4096
_LONGEST_NAME = 200
_LONGEST_RECORD = 65_536
_CHUNK = 65_536
_MOST_LOGGERS = 256
_BURST, _RATE = 1000, 200.0
"""Lines at once, and lines in a second, that are logged; further ones are counted."""
_PAUSE = 0.01
"""Seconds between two looks at a process that writes more: it then waits for this one, and not the other way round."""
_REPORTING = 1.0


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
            text = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                text += "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
            sent = _Record(
                name=record.name[:_LONGEST_NAME],
                level=min(max(record.levelno, 0), 100),
                text=text[:_LONGEST_TEXT].encode("utf-8", "backslashreplace").decode()[:_LONGEST_TEXT],
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


class _Allowance:
    """How many lines may be logged now: a burst, filled again at a rate."""

    def __init__(self) -> None:
        self._left, self._at = float(_BURST), time.monotonic()

    def take(self, wanted: int) -> int:
        """So many of the wanted lines; the others are too many."""
        now = time.monotonic()
        self._left = min(float(_BURST), self._left + _RATE * (now - self._at))
        self._at = now
        given = min(wanted, int(self._left))
        self._left -= given
        return given


class OutputReader:
    """Reads what a child prints and logs, in a thread, and hands it to this process's logging.

    Args:
        backend: Printed lines go to the logger `visionaccel.device.<backend>`, level INFO.
        printed: Read end of the pipe that is the child's stdout and stderr.
        records: Read end of the pipe of a `RecordSender`. Both belong to this object from then on.
    """

    def __init__(self, backend: str, printed: int, records: int) -> None:
        self._logger = safe_logger(f"visionaccel.device.{backend}")
        self._tail: deque[str] = deque(maxlen=_TAIL)
        self._allowance, self._dropped = _Allowance(), 0
        self._names: set[str] = set()
        self._fds = (printed, records)
        # Some process that the vendor's code started may keep the pipes open, so their end cannot be waited for.
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._read, name="visionaccel-output", daemon=True)
        self._thread.start()

    def tail(self) -> tuple[str, ...]:
        """The last lines, printed or logged, oldest first."""
        return tuple(self._tail)

    def close(self, seconds: float = 0.5) -> None:
        """Read what is left, for that long at most, and close the pipes."""
        self._thread.join(seconds)
        os.write(self._stop_write, b".")
        self._thread.join(seconds)
        if self._thread.is_alive():  # Stuck in a log handler; its descriptors must not become somebody else's files.
            return
        for fd in (*self._fds, self._stop_read, self._stop_write):
            os.close(fd)

    def _read(self) -> None:
        printed, records = self._fds
        partial = {printed: b"", records: b""}
        longest = {printed: _LONGEST_LINE, records: _LONGEST_RECORD}
        with selectors.DefaultSelector() as selector:
            for fd in (*self._fds, self._stop_read):
                selector.register(fd, selectors.EVENT_READ)
            open_pipes, reported = 2, time.monotonic()
            while open_pipes:
                ready = {key.fd for key, _ in selector.select(_REPORTING if self._dropped else None)}
                if self._stop_read in ready:
                    break
                before = self._dropped
                for fd in ready:
                    chunk = os.read(fd, _CHUNK)
                    if not chunk:
                        selector.unregister(fd)
                        open_pipes -= 1
                        continue
                    *whole, rest = (partial[fd] + chunk).split(b"\n")
                    if len(rest) > longest[fd]:
                        # A printed line that long is logged in pieces; a record that long is not one of ours.
                        whole, rest = ([*whole, rest] if fd == printed else whole), b""
                    partial[fd] = rest
                    self._take(whole, logged=fd == records)
                if self._dropped and time.monotonic() - reported >= _REPORTING:
                    self._report()
                    reported = time.monotonic()
                elif self._dropped > before:
                    time.sleep(_PAUSE)
        if partial[printed]:
            self._take([partial[printed]], logged=False)
        self._report()

    def _take(self, whole: list[bytes], *, logged: bool) -> None:
        given = self._allowance.take(len(whole))
        for line in whole[:given]:
            self._forward(line, logged=logged)
        dropped = whole[given:]
        self._dropped += len(dropped)
        for line in dropped[-_TAIL:]:  # the last words before a crash are of use all the same
            self._forward(line, logged=logged, quote_only=True)

    def _report(self) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            try:
                self._logger.warning("%d lines were not logged: the device's process writes too many.", dropped)
            except Exception:  # a user's broken log handler
                return

    def _forward(self, line: bytes, *, logged: bool, quote_only: bool = False) -> None:
        try:
            if not logged:
                text = line.decode(errors="backslashreplace").rstrip("\r")
                self._tail.append(one_line(text, _LONGEST_TEXT))
                if not quote_only:
                    self._logger.info("%s", text)
                return
            sent = _Record.model_validate_json(line)
            level = logging.getLevelName(sent.level)
            self._tail.append(one_line(f"{level} {sent.name}: {sent.text}", _LONGEST_TEXT))
            logger = self._named(sent.name)
            if not quote_only and logger.isEnabledFor(sent.level):
                # Made here of these fields alone. Without arguments, a message is not formatted.
                record = logging.LogRecord(
                    logger.name, sent.level, sent.path, sent.line, lines(sent.text), None, None, sent.function
                )
                record.process = sent.process
                logger.handle(record)
        except Exception:  # A broken line, or a user's broken log handler, must not stop the reader: the child would.
            self._logger.debug("A line of the device's process could not be logged.", exc_info=True)

    def _named(self, name: str) -> logging.Logger:
        """The logger of that name; for too many names the backend's, because loggers are never given back."""
        if name not in self._names:
            if len(self._names) >= _MOST_LOGGERS or name.count(".") >= _TAIL:
                return self._logger
            self._names.add(name)
        return logging.getLogger(name)
