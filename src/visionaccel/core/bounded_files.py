"""Reading untrusted files: regular files only, up to a size limit, and strict JSON."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_HOLE_BYTES = 4 * 2**30
"""The maximum number of bytes in holes of a file that is hashed. A sparse file of terabytes takes no space to send and
hours to hash. Weights have no holes."""

MOST_JSON_BYTES = 8 * 2**20
"""The maximum size of a JSON document in bytes. As Python objects it takes up to 25 times as many, and two seconds."""


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; ValueError if it is not a regular file: a named pipe could block without end."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is not a file")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_bounded(path: Path, most: int = MOST_JSON_BYTES) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a file or is larger; the message names the limit.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # At most one byte more than the file has is read: that byte shows that something was appended.
        data = file.read(size + 1) if size <= most else b""
    if size > most or len(data) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return data


def hole_bytes(path: Path, begin: int, end: int) -> int:
    """Count the bytes of a file from `begin` to `end` that are in holes, which take no disk space and read as zeros.

    Counting stops above `MOST_HOLE_BYTES`. On a file system without holes the count is 0. Raises the errors of
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
            except OSError:  # no data follows
                begin = end
            holes += max(0, min(begin, end) - hole)
    return holes


def parse_json(text: str, *, most_digits: int | None = None) -> Any:
    """Parse a JSON document with unique names in each object, finite numbers, and integers of at most `most_digits`.

    Raises:
        ValueError: If the text is not such a document, or is nested too deeply.
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
