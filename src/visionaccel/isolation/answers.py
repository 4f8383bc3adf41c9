"""The child's answers as JSON. The parent makes nothing of them but numbers, texts and its own classes.

A child runs the vendor's code over hostile images. What it sends is therefore never unpickled, and an array is only
taken for numbers: a dtype of Python objects over shared memory would be pointers of the child's choice.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from visionaccel import errors
from visionaccel.backends import Capabilities
from visionaccel.errors import VisionAccelError
from visionaccel.isolation.shared_arrays import ArrayPlace

MOST_BYTES = 2**20
"""Of an answer: places of arrays, or an error with its traceback."""

_LONGEST_TEXT = 2**14
_NUMBERS = re.compile(r"[<>|=]?[biufc](?:1|2|4|8|16|32)")
_CAPABILITIES = TypeAdapter(Capabilities)
_Size = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, slots=True)
class Opened:
    """The session is open."""

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class Places:
    """Where arrays of a call lie: its inputs as a request, its outputs as an answer.

    Attributes:
        arrays: Their places.
        writing_seconds: How long the child took to put an answer there.
    """

    arrays: tuple[ArrayPlace, ...]
    writing_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of a process that lives on.

    Attributes:
        kinds: Its classes as `module:name`, the nearest first; the other process may not have loaded each.
        message: What was wrong and where.
        hint: What to do about it.
        trace: Where it was raised, for people.
    """

    kinds: tuple[str, ...]
    message: str
    hint: str | None
    trace: str


Answer: TypeAlias = Opened | Places | Failure
"""What the child may send."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Place(_Model):
    name: str
    dtype: str
    shape: list[_Size] = Field(max_length=64)
    offset: _Size


class _Failure(_Model):
    kinds: list[str]
    message: str
    hint: str | None
    trace: str


class _Answer(_Model):
    """One of the three."""

    opened: dict[str, Any] | None = None
    places: list[_Place] | None = None
    writing_seconds: float = Field(0.0, ge=0, allow_inf_nan=False)
    failure: _Failure | None = None


def encoded(answer: Answer) -> bytes:
    """An answer as the child sends it.

    Raises:
        TypeError: If an array is of something else than numbers, or the session's capabilities are no plain values.
    """
    match answer:
        case Opened(capabilities=capabilities):
            document: dict[str, Any] = {"opened": dataclasses.asdict(capabilities)}
        case Places(arrays=arrays, writing_seconds=seconds):
            document = {
                "places": [
                    {"name": each.name, "dtype": _name(each.dtype), "shape": each.shape, "offset": each.offset}
                    for each in arrays
                ],
                "writing_seconds": seconds,
            }
        case Failure():
            document = {"failure": dataclasses.asdict(answer)}
    return json.dumps(document, default=_plain).encode()


def decoded(data: bytes) -> Answer:
    """An answer that was received.

    Raises:
        ValueError: If it is none.
    """
    answer = _Answer.model_validate_json(data)
    if answer.opened is not None:
        return Opened(_CAPABILITIES.validate_python(answer.opened))
    if answer.places is not None:
        places = tuple(ArrayPlace(p.name, _dtype(p.dtype), tuple(p.shape), p.offset) for p in answer.places)
        return Places(places, answer.writing_seconds)
    if answer.failure is not None:
        stated = answer.failure
        return Failure(tuple(stated.kinds), stated.message, stated.hint, stated.trace)
    raise ValueError("an answer of none of the kinds")


def failure_of(error: VisionAccelError, trace: str) -> Failure:
    """The message that carries an error."""
    kinds = [kind for kind in type(error).__mro__ if issubclass(kind, VisionAccelError)]
    hint = None if error.hint is None else _sendable(error.hint)
    names = tuple(f"{kind.__module__}:{kind.__qualname__}" for kind in kinds)
    return Failure(names, _sendable(error.message), hint, _sendable(trace[-_LONGEST_TEXT:]))


def restored(failure: Failure) -> VisionAccelError:
    """The error, of the nearest class that this process has loaded, with the child's traceback as a note."""
    made = (_made(kind, failure) for kind in map(_class, failure.kinds) if kind is not None)
    error = next((error for error in made if error is not None), None)
    error = error or errors.DeviceError(failure.message, hint=failure.hint)
    error.add_note(f"In the device's process:\n{failure.trace}")
    return error


def _made(kind: type[VisionAccelError], failure: Failure) -> VisionAccelError | None:
    try:
        return kind(failure.message, hint=failure.hint)
    except Exception:  # a plug-in's class that is made of something else
        return None


def _class(name: str) -> type[VisionAccelError] | None:
    """A class by its name. Nothing is imported for it: what this process did not load is none of its errors."""
    module, _, attribute = name.partition(":")
    found = vars(sys.modules[module]).get(attribute) if module in sys.modules else None
    return found if isinstance(found, type) and issubclass(found, VisionAccelError) else None


def _sendable(text: str) -> str:
    """A text that UTF-8 can hold, and no longer than is of use to anybody."""
    return str(text)[:_LONGEST_TEXT].encode("utf-8", "backslashreplace").decode()


def _name(dtype: np.dtype[Any]) -> str:
    if _NUMBERS.fullmatch(dtype.str):
        return dtype.str
    if getattr(ml_dtypes, dtype.name, None) is dtype.type:
        return dtype.name
    raise TypeError(f"arrays of {dtype} cannot be given to another process; only numbers can.")


def _dtype(name: str) -> np.dtype[Any]:
    if _NUMBERS.fullmatch(name):
        return np.dtype(name)
    kind = vars(ml_dtypes).get(name)
    if isinstance(kind, type) and issubclass(kind, np.generic):
        return np.dtype(kind)
    raise ValueError(f"no dtype of numbers: {name[:100]!r}")


def _plain(value: object) -> object:
    """A scalar of numpy's, which sessions may state their capabilities with."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} {value!r} is no plain value.")
