"""Checks the contract against the vLLM that runs, by names and signatures; nothing of vLLM is called.

Names are looked up where the check runs. In the process that builds the configuration, which has imported nearly all of
their modules by then, a whole check takes some tens of milliseconds.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

from visionaccel.integrations.vllm.compat.contract import AnyOf, Entry, Feature, Need, entries_of

__all__ = ["missing", "missing_of", "way_of"]

_ABSENT = object()


@cache
def missing(feature: Feature, architecture: str | None = None) -> tuple[str, ...]:
    """What a feature needs that this vLLM does not have; empty if its contract holds. Looked up once in a process.

    Args:
        feature: The feature.
        architecture: A model whose own part of the contract counts too.
    """
    return tuple(dict.fromkeys(_all_missing(entries_of(feature, architecture))))


def missing_of(entry: Entry) -> tuple[str, ...]:
    """What an entry needs that this vLLM does not have."""
    if isinstance(entry, Need):
        unused = entry.optional or (entry.where_loaded and entry.module not in sys.modules)
        return () if unused else tuple(_missing(entry))
    found = {name: _all_missing(way) for name, way in entry.ways.items()}
    if not all(found.values()):
        return ()
    return (f"{entry.end}: " + "; or ".join(f"({name}) {', '.join(texts)}" for name, texts in found.items()),)


def way_of(entry: AnyOf) -> str | None:
    """The first way whose needs all hold; None if there is none."""
    return next((name for name, way in entry.ways.items() if not _all_missing(way)), None)


def _all_missing(entries: Iterable[Entry]) -> tuple[str, ...]:
    return tuple(text for entry in entries for text in missing_of(entry))


def _missing(need: Need) -> Iterator[str]:
    label = need.target.replace(":", ".")
    try:
        found = _resolve(need)
        yield from (f"{label} {text}" for text in _unlike(need, found))
    except LookupError as error:
        yield str(error)
    except Exception as error:  # What cannot be looked at is not the name that we know.
        yield f"{label} cannot be inspected ({type(error).__name__}: {error})"


def _resolve(need: Need) -> Any:
    """The object that a need names; a property is not evaluated.

    Raises:
        LookupError: If there is none; says which part of the name is missing.
    """
    try:
        found: Any = import_module(need.module)
    except Exception as error:
        raise LookupError(f"module {need.module} cannot be imported ({type(error).__name__}: {error})") from error
    reached = need.module
    for part in need.name.split("."):
        reached = f"{reached}.{part}"
        found = getattr(found, part, _ABSENT)
        if found is _ABSENT:
            raise LookupError(f"{reached} does not exist")
    return found


def _unlike(need: Need, found: Any) -> Iterator[str]:
    """In what a name that exists differs from what is needed of it."""
    if need.parameters:
        yield from _unlike_signature(need, found)
    if need.attributes:
        known = _attributes(found)
        yield from (f"has no attribute {name}" for name in need.attributes if name not in known)
    if need.mentions:
        used = _mentions(found)
        if used is not None:
            yield from (f"does not use {name}" for name in need.mentions if name not in used)
    if need.use == "call" and getattr(found, "__isabstractmethod__", False):
        yield "is abstract"
    if need.use == "subclass":
        abstract: frozenset[str] = getattr(found, "__abstractmethods__", frozenset())
        yield from (f"has a new abstract method {name}" for name in sorted(abstract - set(need.implements)))


def _unlike_signature(need: Need, found: Any) -> Iterator[str]:
    parameters = list(inspect.signature(found).parameters.values())
    if parameters and parameters[0].name == "self":
        del parameters[0]
    named = [each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        names = {each.name for each in named}
        yield from (f"takes no parameter {name}" for name in need.parameters if name not in names)
    if need.use in ("call", "override"):
        required = [each.name for each in named if each.default is each.empty]
        yield from (f"has a new parameter {name}" for name in required if name not in need.parameters)


def _attributes(kind: Any) -> set[str]:
    """Names that a class has or declares, or that the constructors of it and its bases set."""
    found = set(dir(kind))
    for base in kind.__mro__:
        found |= vars(base).get("__annotations__", {}).keys() | vars(base).get("__dataclass_fields__", {}).keys()
        code = getattr(inspect.unwrap(vars(base)["__init__"]), "__code__", None) if "__init__" in vars(base) else None
        if code is not None:
            found |= {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR"}
    return found


def _mentions(found: Any) -> set[str] | None:
    """Names that a function or a class's methods use; None where a plug-in's function hides one of the methods."""
    if not isinstance(found, type):
        return _names(inspect.unwrap(found).__code__)
    package, names = _package(found), set[str]()
    for base in found.__mro__:
        for function in _methods(base) if _package(base) == package else ():
            if _package(function) not in {package, *sys.stdlib_module_names}:
                return None
            names |= _names(function.__code__)
    return names


def _package(found: Any) -> str:
    """The outermost package that defines a class or function."""
    return str(found.__module__).partition(".")[0]


def _methods(kind: type) -> Iterator[FunctionType]:
    """What a class defines itself, but for special methods, which decorators and protocols generate."""
    for name, value in vars(kind).items():
        inner = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
        if isinstance(inner, FunctionType) and not name.startswith("__"):
            yield inner


def _names(code: CodeType) -> set[str]:
    """Names that code uses, and functions within it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
