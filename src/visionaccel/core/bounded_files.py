"""Reading untrusted files: regular files only, at most a stated number of bytes of each, and strict JSON."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["MOST_HOLE_BYTES", "MOST_JSON_BYTES", "hole_bytes", "open_regular", "parse_json", "read_bounded"]

MOST_HOLE_BYTES = 4 * 2**30
"""Most bytes that are hashed although they are nowhere on the disk. A sparse file of terabytes takes no space to send
and hours to hash; weights have no holes, and bytes on the disk had to be sent."""

MOST_JSON_BYTES = 8 * 2**20
"""Most bytes of a JSON document. As Python's objects it takes up to twenty-five times as many, and two seconds."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, if it is one: opening a named pipe could block without end, and a device has no end.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is something else than a file.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is not a file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_bounded(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """The content of a file.

    Args:
        path: The file.
        most: How many bytes it may have.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a file, or is larger; the text states the limit.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # At most one byte more than the file has is read: that byte shows that something was appended.
        data = file.read(size + 1) if size <= most else b""
    if size > most or len(data) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return data


def hole_bytes(path: Path, begin: int, end: int) -> int:
    """How many of a file's bytes from `begin` to `end` lie in holes, which take no space on the disk and read as zeros.

    Counted until there are more than `MOST_HOLE_BYTES`. File systems that do not know holes say that there are none.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is not a file.
    """
    holes = 0
    with open_regular(path) as file:
        fd = file.fileno()
        while begin < end and holes <= MOST_HOLE_BYTES:
            try:
                hole = os.lseek(fd, begin, os.SEEK_HOLE)
            except OSError:
                break
            try:
                begin = os.lseek(fd, hole, os.SEEK_DATA)
            except OSError:  # there are no data behind it
                begin = end
            holes += max(0, min(begin, end) - hole)
    return holes


def parse_json(text: str, *, most_digits: int | None = None) -> Any:
    """A JSON document with each name once in an object, and numbers that are finite.

    Args:
        text: The document.
        most_digits: How long an integer may be, its sign included; None for what Python takes.

    Raises:
        ValueError: If it is none, or nested too deeply.
    """

    def integer(digits: str) -> int:
        if most_digits is not None and len(digits) > most_digits:
            raise ValueError(f"{digits[:20]}… is too large a number")
        return int(digits)

    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite, parse_int=integer
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice in one object")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number
