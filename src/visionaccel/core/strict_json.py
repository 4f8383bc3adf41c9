"""JSON from untrusted files: each name once in an object, and numbers that are finite."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["parse_json"]


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
