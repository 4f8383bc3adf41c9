"""What a child process is to open, as bytes and descriptors: a program's copies of weights are inherited, not sent.

The child is what unpickles it, see `child`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from visionaccel.core.memory_files import MemoryFile
from visionaccel.core.program import Program


@dataclass(frozen=True, slots=True)
class ParentState:
    """What the child takes over from its parent before anything else is imported or unpickled.

    Attributes:
        search_path: The parent's `sys.path`, without empty entries.
        python_path: The parent's variable PYTHONPATH; None where it is not set.
        log_level: The lowest level of log records that the parent wants.
    """

    search_path: tuple[str, ...]
    python_path: str | None
    log_level: int


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What to open.

    Attributes:
        backend: The backend's name.
        program: The program; weights are referred to by their files.
        device: The backend's device; None for its default.
        options: The options that were given, by name.
    """

    backend: str
    program: Program
    device: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class PackedRequest:
    """A request that starts children any number of times.

    Attributes:
        data: The request, without the memory files.
        files: The memory files that it refers to, kept for as long as a child may be started.
    """

    data: bytes
    files: tuple[MemoryFile, ...]


def packed(request: OpenRequest) -> PackedRequest:
    """A request to start children with.

    Raises:
        Exception: If the program or an option cannot be pickled.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream, pickle.HIGHEST_PROTOCOL)
    pickler.dump(request)
    return PackedRequest(stream.getvalue(), tuple(pickler.files.values()))


class _Pickler(pickle.Pickler):
    def __init__(self, file: BinaryIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.files: dict[int, MemoryFile] = {}

    def persistent_id(self, obj: Any) -> tuple[int, str] | None:
        if not isinstance(obj, MemoryFile):
            return None
        self.files[obj.fd] = obj
        return obj.fd, obj.digest
