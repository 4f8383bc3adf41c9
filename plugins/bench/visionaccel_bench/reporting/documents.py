"""JSON files to report on: files of strangers, read whole or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from visionaccel.core.bounded_files import parse_json, read_bounded
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.safe_text import one_line
from visionaccel.errors import ConfigurationError, InputError

__all__ = ["checked", "parsed", "read_document", "read_text"]

_MIB = 2**20
_MOST_DIGITS = 18

T = TypeVar("T")


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a file.

    Args:
        path: The file.
        most_bytes: How large it may be.

    Raises:
        ConfigurationError: If it cannot be read.
        InputError: If it is larger, no file, or not UTF-8.
    """
    try:
        data = read_bounded(path, most_bytes)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error}", hint="Name a file that is there.") from error
    except ValueError as error:
        raise InputError(
            f"{path} cannot be shown: {error}.", hint="Name a JSON file, of a shorter run if it is too large."
        ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: {error}", hint="Name a JSON file.") from error


def read_document(path: Path, most_bytes: int = 8 * _MIB) -> Any:
    """The JSON document in a file.

    Raises:
        ConfigurationError: If it cannot be read.
        InputError: If it is larger than allowed or no JSON.
    """
    text = read_text(path, most_bytes)
    try:
        return parsed(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no JSON: {one_line(str(error))}", hint="Name a file that visionaccel wrote."
        ) from error


def parsed(text: str) -> Any:
    """A JSON document with integers of a size that figures have.

    Raises:
        ValueError: If it is none.
        RecursionError: If it is nested too deeply.
    """
    return parse_json(text, most_digits=_MOST_DIGITS)


def checked(kind: type[T], document: Any, path: Path, what: str) -> T:
    """A value of a dataclass or model from its JSON document.

    Args:
        kind: The class.
        document: What was read.
        path: Where, for messages.
        what: What it should be, for messages.

    Raises:
        InputError: If it is not.
    """
    try:
        return TypeAdapter(kind).validate_python(document)
    except (ValidationError, RecursionError, ArithmeticError) as error:
        raise InputError(
            f"{path} is not {what}: {one_line(problems_of(error))}.", hint="Name a file that this visionaccel wrote."
        ) from error
