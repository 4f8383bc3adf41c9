"""Messages between a parent and its child: the parent pickles what to open; everything else is JSON.

A child runs vendor code on untrusted images. So what it sends is never unpickled: it becomes numbers, texts and the
classes of this module.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, BinaryIO, TypeAlias

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter

from visionaccel import errors
from visionaccel.backends import Capabilities
from visionaccel.core.memory_files import MemoryFile
from visionaccel.core.program import Program
from visionaccel.errors import VisionAccelError
from visionaccel.isolation.shared_arrays import ArrayPlace, dtype_code

MOST_BYTES = 2**20
"""The largest message: the places of arrays, or an error with its traceback."""

_LONGEST_TEXT = 2**14


@dataclass(frozen=True, slots=True)
class ParentState:
    """The parent's `sys.path` and PYTHONPATH, and the lowest level of log records to send.

    The child applies them before it imports or unpickles anything else.
    """

    search_path: tuple[str, ...]
    python_path: str | None
    log_level: int


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What to open: a program, on a device of a backend (None for its default), with the given options."""

    backend: str
    program: Program
    device: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class PackedRequest:
    """A pickled request, for any number of children: its bytes, and the memory files that children inherit."""

    data: bytes
    files: tuple[MemoryFile, ...]


def packed(request: OpenRequest) -> PackedRequest:
    """Pickle a request. Raises what pickle raises if the program or an option cannot be pickled."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(request)
    return PackedRequest(stream.getvalue(), tuple(pickler.files))


class _Pickler(pickle.Pickler):
    """Pickles memory files as their descriptors, which a child inherits with the same numbers."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.files: list[MemoryFile] = []

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, MemoryFile):
            return NotImplemented
        self.files.append(obj)
        return MemoryFile.inherited, (obj.fd, obj.digest)


@dataclass(frozen=True, slots=True)
class Opened:
    """The answer that the session is open."""

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class Places:
    """Where the arrays of a call are: its inputs, or its outputs with the seconds that the child took to write them."""

    arrays: tuple[ArrayPlace, ...]
    writing_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """An error after which the child continues, with its traceback as text.

    `kinds` are its classes as `module:name`, the most specific first; the parent may not have loaded all of them.
    """

    kinds: tuple[str, ...]
    message: str
    hint: str | None
    trace: str


Message: TypeAlias = Opened | Places | Failure
_MESSAGES: TypeAdapter[Message] = TypeAdapter(Message, config=ConfigDict(extra="forbid"))


def encoded(message: Message) -> bytes:
    """Encode a message. Raises TypeError if the session's capabilities are not plain values."""
    document = asdict(message)
    if isinstance(message, Opened):  # a backend's subclass of Capabilities may have more fields
        document["capabilities"] = {field.name: document["capabilities"][field.name] for field in fields(Capabilities)}
    return json.dumps(document, default=_plain).encode()


def decoded(data: bytes) -> Message:
    """Decode a message. Raises ValueError if it is invalid."""
    return _MESSAGES.validate_json(data)


def failure_of(error: VisionAccelError, trace: str) -> Failure:
    """Make the message for an error."""
    kinds = [kind for kind in type(error).__mro__ if issubclass(kind, VisionAccelError)]
    hint = None if error.hint is None else _sendable(error.hint)
    names = tuple(f"{kind.__module__}:{kind.__qualname__}" for kind in kinds)
    return Failure(names, _sendable(error.message), hint, _sendable(trace[-_LONGEST_TEXT:]))


def restored(failure: Failure) -> VisionAccelError:
    """Recreate the error in the most specific class that this process has loaded; a note has the child's traceback."""
    error: VisionAccelError = errors.DeviceError(failure.message, hint=failure.hint)
    for kind in filter(None, map(_class, reversed(failure.kinds))):
        with suppress(Exception):  # a plug-in's class whose constructor takes other arguments
            error = kind(failure.message, hint=failure.hint)
    error.add_note(f"In the device's process:\n{failure.trace}")
    return error


def _class(name: str) -> type[VisionAccelError] | None:
    """Return an error class by its name, if this process has loaded it. Imports nothing."""
    module, _, attribute = name.partition(":")
    found = getattr(sys.modules.get(module), "__dict__", {}).get(attribute)
    return found if isinstance(found, type) and issubclass(found, VisionAccelError) else None


def _sendable(text: str) -> str:
    """Make a text encodable in UTF-8, and cut it to a useful length."""
    return str(text)[:_LONGEST_TEXT].encode("utf-8", "backslashreplace").decode()


def _plain(value: object) -> object:
    """Convert dtypes, and the numpy scalars that capabilities may contain, for JSON."""
    if isinstance(value, np.dtype):
        return dtype_code(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r} is not a plain value.")
