"""What `bench encode` compares: installed backends, and peers, which have their own tower."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from visionaccel.backends import default_registry
from visionaccel.bundle import is_bundle
from visionaccel.errors import PluginError, SettingsError
from visionaccel.settings import parse_options

Kind: TypeAlias = Literal["backend", "peer"]
Choices: TypeAlias = tuple[str | bool, ...]

DTYPES = ("float32", "bfloat16")
NONE = "none"
BUNDLE = "bundle"
"""Option of a backend that the backend does not see: a bundle to open instead of the source."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The packages that a peer needs, and the values of each of its options."""

    packages: tuple[str, ...]
    options: Mapping[str, Choices]


PEERS: Mapping[str, Peer] = {
    "transformers": Peer(("transformers", "torch"), {"attention": ("sdpa", "eager")}),
    "vllm": Peer(("vllm",), {"enforce_eager": (True, False)}),
}

_FORM = "Pass NAME, NAME@DEVICE or NAME?name=value,name=value, such as 'onnxrt?threads=2'."


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run the tower. `device` is None for a backend's default; peers run on the CPU."""

    kind: Kind
    name: str
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in reports, without a peer's interpreter."""
        options = dict(self.options)
        said = [f"{self.name}@{self.device}" if self.device else self.name]
        if self.kind == "peer":
            options.pop("python", None)
            said += [options.pop("dtype")] if "dtype" in options else []
        said += [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
        return " ".join(said)

    @property
    def python(self) -> str | None:
        """The interpreter of a peer that is installed in a different environment."""
        given = self.options.get("python")
        return None if self.kind == "backend" or given is None else str(given)

    @property
    def bundle(self) -> Path | None:
        """The bundle that a backend opens instead of the source, such as an int8 one."""
        given = self.options.get(BUNDLE)
        return None if self.kind == "peer" or given is None else Path(str(given))


REFERENCE = Contender("peer", "transformers", options={"dtype": "float32"})
"""Embeddings are compared with those of this contender."""

STOCK = Contender("peer", "vllm", options={"dtype": "bfloat16"})
"""Times are compared with those of this contender, the encoder where nothing is offloaded."""


def parse_contender(text: str, kind: Kind) -> Contender:
    """Parse `NAME[@DEVICE][?name=value,...]`; options may be a JSON object.

    Raises:
        SettingsError: The text has a different form, or an unknown peer or option of a peer.
        UnknownBackendError: The backend is not installed.
    """
    place, question, options_text = text.partition("?")
    name, at, device = place.partition("@")
    try:
        options = parse_options(options_text)
    except ValueError as error:
        raise SettingsError(f"--{kind} {text!r}: {error}.", hint=_FORM) from error
    if not name or (at and not device) or (question and not options) or not isinstance(options, dict):
        raise SettingsError(f"--{kind} {text!r} is malformed.", hint=_FORM)
    if kind == "peer":
        _check_peer(text, name, device, options)
    else:
        default_registry().entry(name)
        if BUNDLE in options and not is_bundle(str(options[BUNDLE])):
            raise SettingsError(
                f"--{kind} {text!r}: {options[BUNDLE]} is not a bundle.", hint="Pass a folder with visionaccel.json."
            )
    return Contender(kind, name, device or None, options)


def named_backends(texts: Sequence[str]) -> tuple[Contender, ...]:
    """Return the named backends; every installed one that `auto` asks if none is named; none for `none`."""
    if list(texts) == [NONE]:
        return ()
    if not texts:
        return tuple(Contender("backend", name) for name in _installed())
    return _different(parse_contender(text, "backend") for text in texts)


def named_peers(texts: Sequence[str]) -> tuple[Contender, ...]:
    """Return the named peers, without a dtype in each; all if none is named; none for `none`."""
    if list(texts) == [NONE]:
        return ()
    given = [parse_contender(text, "peer") for text in texts or PEERS]
    return _different(
        Contender("peer", each.name, options={"dtype": dtype, **each.options})
        for each in given
        for dtype in ([each.options["dtype"]] if "dtype" in each.options else DTYPES)
    )


def absence(contender: Contender) -> str | None:
    """Return why a peer cannot run in this environment, and what to do; None for backends and other interpreters."""
    if contender.kind == "backend" or contender.python is not None:
        return None
    packages = PEERS[contender.name].packages
    missing_packages = [package for package in packages if not _importable(package)]
    if not missing_packages:
        return None
    return (
        f"absent: {' and '.join(missing_packages)} not installed. Install it (pip install {' '.join(packages)}), or "
        f"pass an environment that has it: --peer '{contender.name}?python=PATH'."
    )


def _check_peer(text: str, name: str, device: str, options: Mapping[str, Any]) -> None:
    if name not in PEERS:
        raise SettingsError(f"unknown peer {name!r}.", hint=f"Choose {' or '.join(PEERS)}.")
    if device:
        raise SettingsError(f"--peer {text!r}: peers run on the CPU.", hint=f"Pass {name} without a device.")
    # `python` is an interpreter of a different environment that has the peer and this package.
    known: dict[str, Choices | None] = {"dtype": DTYPES, "python": None, **PEERS[name].options}
    for option, value in options.items():
        if option not in known:
            raise SettingsError(
                f"--peer {text!r}: unknown option {option!r}.", hint=f"Choose one of: {', '.join(sorted(known))}."
            )
        choices = known[option]
        if choices is not None and value not in choices:
            named = [str(each).lower() for each in choices]
            raise SettingsError(
                f"--peer {text!r}: {option} must be one of {', '.join(named)}.", hint=f"Pass {option}={named[0]}."
            )


def _installed() -> list[str]:
    """Return the backends that `auto` asks, and those that cannot be loaded, so that the report says why."""
    registry = default_registry()
    names = []
    for entry in registry.entries:
        with suppress(PluginError):
            if registry.load(entry.name).only_by_name:
                continue
        names.append(entry.name)
    return names


def _different(contenders: Iterable[Contender]) -> tuple[Contender, ...]:
    found: dict[str, Contender] = {}
    for each in contenders:
        if each.label in found:
            raise SettingsError(f"{each.label} is given twice.", hint="Pass each contender once.")
        found[each.label] = each
    return tuple(found.values())


def _importable(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False
