"""Log records that cross a pipe, one line of JSON each, and the pipes' reader."""

from __future__ import annotations

import json
import logging
import os
import selectors
import threading
import traceback
from collections import deque
from typing import Any

from visionaccel.safe_text import safe_logger

__all__ = ["OutputReader", "RecordSender"]

_TAIL = 20
_LONGEST_LINE = 16_384
_LONGEST_RECORD = 2**20
_CHUNK = 65_536


class RecordSender(logging.Handler):
    """The child's only log handler: sends each record to the parent, which knows what to do with it."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, its message formatted; what `extra` added goes along if it is plain."""
        try:
            plain = {name: value for name, value in vars(record).items() if isinstance(value, str | int | float)}
            text = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                text += "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
            line = json.dumps({**plain, "msg": text[: _LONGEST_LINE // 4]}) + "\n"
            rest = line.encode()
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except Exception:
            self.handleError(record)


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
        with selectors.DefaultSelector() as selector:
            for fd in (*self._fds, self._stop_read):
                selector.register(fd, selectors.EVENT_READ)
            open_pipes = 2
            while open_pipes:
                ready = {key.fd for key, _ in selector.select()}
                if self._stop_read in ready:
                    break
                for fd in ready:
                    chunk = os.read(fd, _CHUNK)
                    if not chunk:
                        selector.unregister(fd)
                        open_pipes -= 1
                        continue
                    *lines, rest = (partial[fd] + chunk).split(b"\n")
                    if len(rest) > _LONGEST_LINE and fd == printed:
                        lines, rest = [*lines, rest], b""
                    partial[fd] = rest if len(rest) <= _LONGEST_RECORD else b""  # a record that long is none of ours
                    for line in lines:
                        self._forward(line, logged=fd == records)
        if partial[printed]:
            self._forward(partial[printed], logged=False)

    def _forward(self, line: bytes, *, logged: bool) -> None:
        try:
            if not logged:
                text = line.decode(errors="backslashreplace").rstrip("\r")
                self._tail.append(text)
                self._logger.info("%s", text)
                return
            fields: dict[str, Any] = {"args": None, "exc_info": None, "exc_text": None, **json.loads(line)}
            record = logging.makeLogRecord(fields)
            self._tail.append(f"{record.levelname} {record.name}: {record.getMessage()}")
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
        except Exception:  # A broken line, or a user's broken log handler, must not stop the reader: the child would.
            self._logger.debug("A line of the device's process could not be logged.", exc_info=True)
