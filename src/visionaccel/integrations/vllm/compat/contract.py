"""The contract with vLLM: what each feature relies on, as data, and its check against the running vLLM.

The rows are in `contract.toml`. Names and signatures are checked, and nothing of vLLM is called. A check takes some
tens of milliseconds in the process that builds the configuration, which has imported nearly all of the modules by then.
"""

from __future__ import annotations

import dis
import inspect
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, reduce
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Literal

from visionaccel.integrations.vllm.compat import release
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES


class Feature(StrEnum):
    """A part of the integration that is switched on or off as a whole."""

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
    # What it must take. If it is called or overridden, it may have no other parameter without a default.
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()  # that its instances must have: fields, class attributes, or set by constructors
    mentions: tuple[str, ...] = ()  # names that its code, or that of one of a class's methods, must use
    implements: tuple[str, ...] = ()  # methods of our subclass; the class may have no other abstract ones
    optional: bool = False  # used where it exists
    where_loaded: bool = False  # only checked in processes that have loaded the module, because no other uses it

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def name(self) -> str:
        """The dotted name in the module."""
        return self.target.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row: named ways to the same end, of which one is enough. Most rows have one way, and name neither."""

    end: str
    ways: Mapping[str, tuple[Need, ...]]

    @property
    def needs(self) -> tuple[Need, ...]:
        """The needs of all ways."""
        return tuple(each for way in self.ways.values() for each in way)


_ABSENT: Any = object()

_TABLE: dict[str, Any] = tomllib.loads(Path(__file__).with_name("contract.toml").read_text(encoding="utf-8"))

WITHOUT: Mapping[str, str] = _TABLE["without"]
"""What happens without each feature."""


def _entry(row: Mapping[str, Any], names: Mapping[str, str]) -> Entry:
    """Return a row of the table, with `names` inserted in its braces."""
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
    """Return what a feature needs of vLLM for every model and, with an architecture, of that model's own classes."""
    if architecture is not None:
        row = ARCHITECTURES[architecture]
        return (*entries_of(feature), *entries_of_model(feature, row.model, row.towers))
    shared = _TABLE["items"] if feature in (Feature.CONTAINMENT, Feature.PIPELINED) else []
    return tuple(_entry(each, {}) for each in (*shared, *_TABLE[feature]))


def entries_of_model(feature: Feature, model: str, towers: Iterable[str]) -> tuple[Entry, ...]:
    """Return what a feature needs of one model's own classes, as `Architecture` names them."""
    names = {
        "model": model,
        "module": model.partition(":")[0],
        "info": f"{model}._processor_factory.info",
        "processor": f"{model}._processor_factory.processor",
        "towers": " ".join(towers),
    }
    found: list[Entry] = []
    for each in _TABLE["model"].get(feature, ()):
        entries = [_entry(each, {**names, "tower": tower}) for tower in towers]
        found += [entry for entry in entries if entry not in found]
    return tuple(found)


BY_OUR_SCHEDULER = "the contained scheduler ends it"
FAILED_REQUESTS = next(entry for entry in entries_of(Feature.PIPELINED) if entry.end)
"""How a request ends whose image failed; `BY_OUR_SCHEDULER` is one of the ways."""
assert BY_OUR_SCHEDULER in FAILED_REQUESTS.ways


def why_off(feature: Feature, architecture: str | None = None) -> str | None:
    """Return what a feature lacks, as a clause for a log or an error; None if the contract holds."""
    lacking = missing(feature, architecture)
    return f"vLLM {release()} lacks what the {feature} feature needs: {'; '.join(lacking)}" if lacking else None


@cache
def missing(feature: Feature, architecture: str | None = None) -> tuple[str, ...]:
    """Return what this vLLM lacks of the entries of a feature; checked once in a process."""
    return tuple(dict.fromkeys(text for entry in entries_of(feature, architecture) for text in missing_of(entry)))


def missing_of(entry: Entry) -> tuple[str, ...]:
    """Return what this vLLM lacks of an entry."""
    found = {name: missing_names(way) for name, way in entry.ways.items()}
    if not all(found.values()):
        return ()
    if not entry.end:
        return found[""]
    return (f"{entry.end}: " + "; or ".join(f"({name}) {', '.join(texts)}" for name, texts in found.items()),)


def way_of(entry: Entry) -> str | None:
    """Return the first way of an entry that this vLLM has, or None."""
    return next((name for name, way in entry.ways.items() if not missing_names(way)), None)


def missing_names(needs: Iterable[Need]) -> tuple[str, ...]:
    """Return what this vLLM lacks of some needs."""
    return tuple(text for need in needs for text in _missing(need))


def _missing(need: Need) -> Iterator[str]:
    if need.optional or (need.where_loaded and need.module not in sys.modules):
        return
    label = need.target.replace(":", ".")
    try:
        module = import_module(need.module)
    except Exception as error:
        yield f"module {need.module} cannot be imported ({type(error).__name__}: {error})"
        return
    try:
        found = reduce(lambda owner, name: getattr(owner, name, _ABSENT), need.name.split("."), module)
        problems = ("does not exist",) if found is _ABSENT else _unlike(need, found)
        yield from (f"{label} {text}" for text in problems)
    except Exception as error:  # it may be something else under the same name
        yield f"{label} cannot be inspected ({type(error).__name__}: {error})"


def _unlike(need: Need, found: Any) -> Iterator[str]:
    """Yield how an object of vLLM differs from what is needed."""
    if need.parameters:
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


def _attributes(kind: Any) -> set[str]:
    """Return the names that a class has or declares, or that its constructor or those of its bases set."""
    found = set(dir(kind))
    for base in kind.__mro__:
        found |= vars(base).get("__annotations__", {}).keys() | vars(base).get("__dataclass_fields__", {}).keys()
        code = getattr(inspect.unwrap(vars(base).get("__init__", object)), "__code__", None)
        if code is not None:
            found |= {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR"}
    return found


def _mentions(found: Any) -> set[str] | None:
    """Return the names that a function or a class's methods use; None if a plug-in has replaced one of the methods."""
    if not isinstance(found, type):
        return _names(inspect.unwrap(found).__code__)
    package, names = _package(found), set[str]()
    for base in found.__mro__:
        members = vars(base).items() if _package(base) == package else ()
        for name, value in members:
            method = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
            if not isinstance(method, FunctionType) or name.startswith("__"):  # decorators generate special methods
                continue
            if _package(method) not in {package, *sys.stdlib_module_names}:
                return None
            names |= _names(method.__code__)
    return names


def _package(found: Any) -> str:
    """Return the outermost package that defines a class or function."""
    return str(found.__module__).partition(".")[0]


def _names(code: CodeType) -> set[str]:
    """Return the names that a code object and its inner functions use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names
