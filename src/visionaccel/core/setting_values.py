"""Values of settings from text."""

from __future__ import annotations

import re
from typing import Any

from visionaccel.core.cores import parse_cores
from visionaccel.core.strict_json import parse_json

__all__ = ["parse_options", "printable_only", "read_bytes", "read_chain", "read_cores", "read_names"]

_MOST_NESTED = 32
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)")
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgtp", 1)
    for unit, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}


def parse_options(value: Any) -> Any:
    """Backend options from text: a JSON object, or `name=value,name=value` where values are JSON or plain text.

    Raises:
        ValueError: If it is neither, names an option twice, or has a number that is not finite or an object that is
            nested too deeply.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("{"):
        return _shallow(parse_json(text))
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, item = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is not of the form name=value")
        name = name.strip()
        if name in options:
            raise ValueError(f"option {name!r} is given twice")
        options[name] = _option(item.strip())
    return _shallow(options)


def _shallow(options: Any) -> Any:
    """Refuses what is nested so deeply that other readers would give up on it."""
    level = [options]
    for _ in range(_MOST_NESTED):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
        ]
        if not level:
            return options
    raise ValueError("it is nested too deeply")


def _option(text: str) -> Any:
    """The value of an option: JSON if it is some, and plain text otherwise."""
    try:
        return parse_json(text)
    except ValueError:
        if text.startswith(("{", "[")) or text.lstrip("+-").lower() in ("nan", "inf", "infinity"):
            raise  # meant as JSON, or as a number
        return text


def read_bytes(value: Any) -> Any:
    """A size in bytes from text such as `512MiB` or `1.5 GB`. pydantic's would read 1 from `1,5GiB`."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise ValueError("a size is a number with a unit, such as 512MiB, 1.5GiB or 2GB")
    return round(float(match[1]) * unit)


def printable_only(value: Any) -> Any:
    """Refuses text that a terminal would obey rather than show."""
    if not str(value).isprintable():
        raise ValueError("it has characters that cannot be printed")
    return value


def read_names(value: Any) -> Any:
    """Names from text, separated by commas."""
    return tuple(filter(None, (name.strip() for name in value.split(",")))) if isinstance(value, str) else value


def read_cores(value: Any) -> Any:
    """Core numbers from text, or the word `all`."""
    return parse_cores(value) if isinstance(value, str) else value


def read_chain(value: Any) -> Any:
    """Names of a chain from text; none by the word `none`, and by None."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return ()
    return read_names(value)
