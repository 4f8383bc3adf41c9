"""Kinds of hostile input: what is written where, what reads it, and how many cases of all it has."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import strategies as st

Files = Mapping[str, bytes | None]
"""Content by path below a folder of the seeds; None for a file that is not there, `PIPE` for a named pipe."""

PIPE = b"<pipe>"


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        name: Its name in the table.
        base: The folder of the seeds that inputs change.
        crafted: Inputs made by hand, each of which is a case. Gets the folder.
        inputs: Inputs at random. Gets the folder.
        read: Reads one, or raises. What it returns or does not raise counts as read.
        share: Of 10,000 cases.
        whole: What makes the folder a good one, where the seeds alone do not.
    """

    name: str
    base: str
    crafted: Callable[[Path], list[Files]]
    inputs: Callable[[Path], st.SearchStrategy[Files]]
    read: Callable[[Path], object]
    share: int
    whole: Files = field(default_factory=dict)


class Changed:
    """A folder with an input in it, put back afterwards."""

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder, self._files = folder, files
        self._before: dict[str, bytes | None] = {}

    def __enter__(self) -> None:
        for name, data in self._files.items():
            path = self._folder / name
            self._before[name] = path.read_bytes() if path.is_file() else None
            _put(path, data)

    def __exit__(self, *_: object) -> None:
        for name, data in self._before.items():
            _put(self._folder / name, data)


def _put(path: Path, data: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if data == PIPE:
        os.mkfifo(path)
    elif data is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
