"""What `bench encode` compares: backends of this package, and peers that bring their own tower."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from visionaccel.backends import default_registry
from visionaccel.bundle import is_bundle
from visionaccel.errors import PluginError, SettingsError
from visionaccel.settings import parse_options

Kind: TypeAlias = Literal["backend", "peer"]

PEERS: Mapping[str, tuple[tuple[str, ...], str, frozenset[str]]] = MappingProxyType(
    {
        "transformers": (("torch", "transformers"), "transformers torch", frozenset({"attention"})),
        "vllm": (("vllm",), "vllm", frozenset({"enforce_eager"})),
    }
)
"""Peers: the modules that each needs, what pip installs for it, and its options in addition to those of every peer."""

DTYPES = ("float32", "bfloat16")
NONE = "none"
BUNDLE = "bundle"
"""Option of a backend's contender that the backend does not see: a bundle to open instead of the source."""
_OF_EVERY_PEER = frozenset({"dtype", "python"})


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run the tower.

    Attributes:
        kind: A backend of this package, or a peer.
        name: The backend's or the peer's name.
        device: The backend's device; None for its default. Peers run on the CPU.
        options: The backend's options, and `bundle`, a folder that it opens instead of the source. For a peer,
            `dtype`, `python` (an interpreter of another environment that has the peer and this package), and the
            peer's own.
    """

    kind: Kind
    name: str
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in reports, without the environment of a peer."""
        options = dict(self.options)
        dtype = options.pop("dtype", None) if self.kind == "peer" else None
        if self.kind == "peer":
            options.pop("python", None)
        at = f"@{self.device}" if self.device else ""
        said = [str(dtype)] if dtype else []
        said += [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
        return " ".join([f"{self.name}{at}", *said])

    @property
    def python(self) -> str | None:
        """The interpreter of a peer that lives in another environment."""
        given = self.options.get("python")
        return None if self.kind == "backend" or given is None else str(given)

    @property
    def bundle(self) -> Path | None:
        """The bundle that a backend opens instead of the source, such as one of int8."""
        given = self.options.get(BUNDLE)
        return None if self.kind == "peer" or given is None else Path(str(given))


REFERENCE = Contender("peer", "transformers", options={"dtype": "float32"})
"""What accuracy is measured against."""

STOCK = Contender("peer", "vllm", options={"dtype": "bfloat16"})
"""What speed is compared with: the encoder where nothing is offloaded."""


def parse_contender(text: str, kind: Kind) -> Contender:
    """A contender from `NAME[@DEVICE][?name=value,...]`; options may be a JSON object.

    Raises:
        SettingsError: If the text is of another form, or names no such peer or option of a peer.
        UnknownBackendError: If no such backend is installed.
    """
    place, question, options_text = text.partition("?")
    name, at, device = place.partition("@")
    try:
        options = parse_options(options_text)
    except ValueError as error:
        raise SettingsError(f"--{kind} {text!r}: {error}.", hint=_FORM) from error
    if not name or (at and not device) or (question and not options) or not isinstance(options, dict):
        raise SettingsError(f"--{kind} {text!r} is malformed.", hint=_FORM)
    if kind == "backend":
        default_registry().entry(name)
        if BUNDLE in options and not is_bundle(str(options[BUNDLE])):
            raise SettingsError(
                f"--{kind} {text!r}: {options[BUNDLE]} is not a bundle.",
                hint="Name a folder that holds visionaccel.json.",
            )
    else:
        _check_peer(text, name, device, options)
    return Contender(kind, name, device or None, options)


def named_backends(texts: Sequence[str]) -> tuple[Contender, ...]:
    """The named backends; without names, every installed one that `auto` would ask; for `none`, no backend.

    Raises:
        SettingsError: As `parse_contender`, or if one is named twice.
        UnknownBackendError: As `parse_contender`.
    """
    if list(texts) == [NONE]:
        return ()
    if texts:
        return _different(parse_contender(text, "backend") for text in texts)
    return tuple(Contender("backend", name) for name in _installed())


def named_peers(texts: Sequence[str]) -> tuple[Contender, ...]:
    """The named peers; without names, all; for `none`, no peer. One without a dtype takes part in each.

    Raises:
        SettingsError: As `parse_contender`, or if one is named twice.
    """
    if list(texts) == [NONE]:
        return ()
    given = [parse_contender(text, "peer") for text in texts or PEERS]
    return _different(
        each if "dtype" in each.options else Contender("peer", each.name, options={"dtype": dtype, **each.options})
        for each in given
        for dtype in (DTYPES if "dtype" not in each.options else DTYPES[:1])
    )


def absence(contender: Contender) -> str | None:
    """Why a peer cannot run in this environment, and what to do; None if it may, and for backends."""
    if contender.kind == "backend":
        return None
    modules, install, _ = PEERS[contender.name]
    if contender.python is not None:
        missing = not Path(contender.python).is_file()
        return f"absent: there is no interpreter {contender.python}." if missing else None
    missing_modules = [module for module in modules if not _importable(module)]
    if not missing_modules:
        return None
    return (
        f"absent: {' and '.join(missing_modules)} not installed. Install it (pip install {install}), or name an "
        f"environment that has it: --peer '{contender.name}?python=PATH'."
    )


_FORM = "Write NAME, NAME@DEVICE or NAME?name=value,name=value, such as 'onnxrt?threads=2'."


def _check_peer(text: str, name: str, device: str, options: Mapping[str, Any]) -> None:
    if name not in PEERS:
        raise SettingsError(f"--peer {text!r}: there is no peer {name!r}.", hint=f"Peers: {', '.join(PEERS)}.")
    if device:
        raise SettingsError(f"--peer {text!r}: peers run on the CPU.", hint=f"Write {name} without a device.")
    known = _OF_EVERY_PEER | PEERS[name][2]
    unknown = sorted(set(options) - known)
    if unknown:
        raise SettingsError(
            f"--peer {text!r}: {name} has no option {unknown[0]!r}.", hint=f"Its options: {', '.join(sorted(known))}."
        )
    allowed: Mapping[str, tuple[str | bool, ...]] = {
        "dtype": DTYPES, "attention": ("sdpa", "eager"), "enforce_eager": (True, False),
    }  # fmt: skip
    for option, choices in allowed.items():
        if option in options and options[option] not in choices:
            known_values = [str(each).lower() for each in choices]
            raise SettingsError(
                f"--peer {text!r}: {option} must be one of {', '.join(known_values)}.",
                hint=f"Such as {option}={known_values[0]}.",
            )


def _installed() -> list[str]:
    registry = default_registry()
    names = []
    for entry in registry.entries:
        try:
            if not registry.load(entry.name).only_by_name:
                names.append(entry.name)
        except PluginError:  # it becomes a row that says so
            names.append(entry.name)
    return names


def _different(contenders: Iterable[Contender]) -> tuple[Contender, ...]:
    found: dict[str, Contender] = {}
    for each in contenders:
        if each.label in found:
            raise SettingsError(f"{each.label} is named twice.", hint="Name each contender once.")
        found[each.label] = each
    return tuple(found.values())


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
