"""The contract with vLLM: what each feature relies on, as data, and its check against the vLLM that runs.

The rows are in `contract.toml`. Names and signatures are checked, and nothing of vLLM is called. In the process that
builds the configuration, which has imported nearly all of the modules by then, a check takes some tens of milliseconds.
"""

from __future__ import annotations

import dis
import inspect
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Literal

from visionaccel.integrations.vllm.compat import release
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES


class Feature(StrEnum):
    """A part of the integration that is on or off as a whole."""

    INLINE = "in-line"
    FITTING = "fitting"
    CONTAINMENT = "containment"
    PIPELINED = "pipelined"
    REASONS = "reasons"
    METRICS = "metrics"
    POOLING = "pooling"


@dataclass(frozen=True, slots=True)
class Need:
    """One name of vLLM, and what must be true of it."""

    use: Literal["call", "read", "subclass", "override", "patch"]  # `patch`: replaced by a function of this package
    target: str  # `module:Class.attribute`
    # What it must take. Another parameter without a default breaks the contract too where it is called or overridden.
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()  # of its instances: fields, class attributes, or what its constructor sets
    mentions: tuple[str, ...] = ()  # names that its code, or that of one of a class's methods, must use
    implements: tuple[str, ...] = ()  # methods of our subclass; another abstract one breaks the contract
    optional: bool = False  # used where it exists
    where_loaded: bool = False  # checked only in a process that has loaded the module; no other uses it

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def name(self) -> str:
        """Dotted name in the module."""
        return self.target.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row: ways to the same end, by a short name, of which one is enough. Most rows have one way and name no end."""

    end: str
    ways: Mapping[str, tuple[Need, ...]]

    @property
    def needs(self) -> tuple[Need, ...]:
        """All ways together."""
        return tuple(each for way in self.ways.values() for each in way)


_ABSENT = object()

_TABLE: dict[str, Any] = tomllib.loads(Path(__file__).with_name("contract.toml").read_text(encoding="utf-8"))

WITHOUT: Mapping[str, str] = _TABLE["without"]
"""What happens without each feature."""


def _entry(row: Mapping[str, Any], names: Mapping[str, str]) -> Entry:
    """A row of the table, with `names` for what is in braces."""
    ways = row.get("ways", ({"way": "", "needs": (row,)},))
    return Entry(row.get("end", ""), {way["way"]: tuple(_need(each, names) for each in way["needs"]) for way in ways})


def _need(row: Mapping[str, Any], names: Mapping[str, str]) -> Need:
    (use, target), *conditions = row.items()
    words: dict[str, Any] = {
        key: value if isinstance(value, bool) else tuple(value.format_map(names).split()) for key, value in conditions
    }
    return Need(use, target.format_map(names), **words)  # type: ignore[arg-type]


@cache
def entries_of(feature: Feature, architecture: str | None = None) -> tuple[Entry, ...]:
    """What a feature needs of vLLM for every model and, with an architecture, of that model's own classes."""
    shared = _TABLE["items"] if feature in (Feature.CONTAINMENT, Feature.PIPELINED) else []
    found = [_entry(each, {}) for each in (*shared, *_TABLE[feature])]
    if architecture is None:
        return tuple(found)
    row = ARCHITECTURES[architecture]
    names = {
        "model": row.model,
        "module": row.model.partition(":")[0],
        "info": f"{row.model}._processor_factory.info",
        "processor": f"{row.model}._processor_factory.processor",
        "towers": " ".join(row.towers),
        "attribute": row.tower,
    }
    for each in _TABLE["model"].get(feature, ()):
        for tower in row.towers:
            entry = _entry(each, {**names, "tower": tower})
            if entry not in found:
                found.append(entry)
    return tuple(found)


BY_OUR_SCHEDULER = "the contained scheduler ends it"
FAILED_REQUESTS = next(entry for entry in entries_of(Feature.PIPELINED) if entry.end)
"""How a request ends whose image failed; `BY_OUR_SCHEDULER` is one of the ways."""
assert BY_OUR_SCHEDULER in FAILED_REQUESTS.ways


def why_off(feature: Feature, architecture: str | None = None) -> str | None:
    """What `missing` finds, as a clause for a log or an error; None if the contract holds."""
    lacking = missing(feature, architecture)
    return f"vLLM {release()} is not what the {feature} feature needs: {'; '.join(lacking)}" if lacking else None


@cache
def missing(feature: Feature, architecture: str | None = None) -> tuple[str, ...]:
    """What a feature needs, as `entries_of` says, that this vLLM does not have. Looked up once in a process."""
    return tuple(dict.fromkeys(text for entry in entries_of(feature, architecture) for text in missing_of(entry)))


def missing_of(entry: Entry) -> tuple[str, ...]:
    """What an entry needs that this vLLM does not have."""
    found = {name: missing_names(way) for name, way in entry.ways.items()}
    if not all(found.values()):
        return ()
    if not entry.end:
        return found[""]
    return (f"{entry.end}: " + "; or ".join(f"({name}) {', '.join(texts)}" for name, texts in found.items()),)


def way_of(entry: Entry) -> str | None:
    """The first way whose needs all hold; None if there is none."""
    return next((name for name, way in entry.ways.items() if not missing_names(way)), None)


def missing_names(needs: Iterable[Need]) -> tuple[str, ...]:
    """What of some names this vLLM does not have."""
    return tuple(text for need in needs for text in _missing(need))


def _missing(need: Need) -> Iterator[str]:
    if need.optional or (need.where_loaded and need.module not in sys.modules):
        return
    label = need.target.replace(":", ".")
    try:
        found = _resolve(need)
        yield from (f"{label} {text}" for text in _unlike(need, found))
    except LookupError as error:
        yield str(error)
    except Exception as error:  # not the name that we know
        yield f"{label} cannot be inspected ({type(error).__name__}: {error})"


def _resolve(need: Need) -> Any:
    """The object that a need names; a property is not evaluated. A LookupError says which part of it is missing."""
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
        code = getattr(inspect.unwrap(vars(base).get("__init__", object)), "__code__", None)
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
    """Names that code and the functions within it use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
