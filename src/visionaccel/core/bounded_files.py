"""Reading untrusted files: regular files only, at most a stated number of bytes of each, and strict JSON."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_HOLE_BYTES = 4 * 2**30
"""Most bytes that are hashed although they are nowhere on the disk. A sparse file of terabytes takes no space to send
and hours to hash; weights have no holes, and bytes on the disk had to be sent."""

MOST_JSON_BYTES = 8 * 2**20
"""Most bytes of a JSON document. As Python's objects it takes up to twenty-five times as many, and two seconds."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; ValueError if it is not a regular file, as a named pipe could block without end."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is not a file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_bounded(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """The content of a file of at most that many bytes.

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

    Counted until there are more than `MOST_HOLE_BYTES`. A file system that does not know holes reports none. Raises as
    `open_regular`.
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
    """A JSON document with each name once in an object, finite numbers, and integers of at most so many characters.

    Raises:
        ValueError: If it is not such a document, or nested too deeply.
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
