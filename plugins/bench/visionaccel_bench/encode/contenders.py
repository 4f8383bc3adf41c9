"""What `bench encode` compares: installed backends, and peers that bring their own tower."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

from visionaccel.backends import default_registry
from visionaccel.bundle import is_bundle
from visionaccel.errors import PluginError, SettingsError
from visionaccel.settings import parse_options

Kind: TypeAlias = Literal["backend", "peer"]
Dtype: TypeAlias = Literal["float32", "bfloat16"]


DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Peer:
    """The modules that a peer needs, what pip installs for it, and its options with the values of each."""

    modules: tuple[str, ...]
    install: str
    options: Mapping[str, tuple[str | bool, ...]]


PEERS: Mapping[str, Peer] = {
    "transformers": Peer(("torch", "transformers"), "transformers torch", {"attention": ("sdpa", "eager")}),
    "vllm": Peer(("vllm",), "vllm", {"enforce_eager": (True, False)}),
}
NONE = "none"
BUNDLE = "bundle"
"""Option of a backend's contender that the backend does not see: a bundle to open instead of the source."""

_FORM = "Write NAME, NAME@DEVICE or NAME?name=value,name=value, such as 'onnxrt?threads=2'."


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run the tower. `device` is None for a backend's default; peers run on the CPU."""

    kind: Kind
    name: str
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in reports, without the environment of a peer."""
        options = dict(self.options)
        said = [f"{self.name}@{self.device}" if self.device else self.name]
        if self.kind == "peer":
            options.pop("python", None)
            said += [options.pop("dtype")] if "dtype" in options else []
        said += [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]
        return " ".join(said)

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
        SettingsError: If the text has another form, or names an unknown peer or option of a peer.
        UnknownBackendError: If the backend is not installed.
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
        return Contender(kind, name, options=options)
    default_registry().entry(name)
    if BUNDLE in options and not is_bundle(str(options[BUNDLE])):
        raise SettingsError(
            f"--{kind} {text!r}: {options[BUNDLE]} is not a bundle.", hint="Name a folder that holds visionaccel.json."
        )
    return Contender(kind, name, device or None, options)


def named_backends(texts: Sequence[str]) -> tuple[Contender, ...]:
    """The named backends, each once; without names, every installed one that `auto` would ask; for `none`, none."""
    if list(texts) == [NONE]:
        return ()
    if texts:
        return _different(parse_contender(text, "backend") for text in texts)
    return tuple(Contender("backend", name) for name in _installed())


def named_peers(texts: Sequence[str]) -> tuple[Contender, ...]:
    """The named peers, each once; without names, all; for `none`, none. One without a dtype takes part in each."""
    if list(texts) == [NONE]:
        return ()
    given = [parse_contender(text, "peer") for text in texts or PEERS]
    return _different(
        Contender("peer", each.name, options={"dtype": dtype, **each.options})
        for each in given
        for dtype in ([each.options["dtype"]] if "dtype" in each.options else DTYPES)
    )


def absence(contender: Contender) -> str | None:
    """Why a peer cannot run in this environment, and what to do; None if it may, and for backends."""
    if contender.kind == "backend":
        return None
    peer = PEERS[contender.name]
    if contender.python is not None:
        missing = not Path(contender.python).is_file()
        return f"absent: there is no interpreter {contender.python}." if missing else None
    missing_modules = [module for module in peer.modules if not _importable(module)]
    if not missing_modules:
        return None
    return (
        f"absent: {' and '.join(missing_modules)} not installed. Install it (pip install {peer.install}), or name an "
        f"environment that has it: --peer '{contender.name}?python=PATH'."
    )


def _check_peer(text: str, name: str, device: str, options: Mapping[str, Any]) -> None:
    if name not in PEERS:
        raise SettingsError(f"--peer {text!r}: there is no peer {name!r}.", hint=f"Peers: {', '.join(PEERS)}.")
    if device:
        raise SettingsError(f"--peer {text!r}: peers run on the CPU.", hint=f"Write {name} without a device.")
    # `python` is an interpreter of another environment that has the peer and this package.
    known: dict[str, tuple[str | bool, ...] | None] = {"dtype": DTYPES, "python": None, **PEERS[name].options}
    for option, value in options.items():
        if option not in known:
            raise SettingsError(
                f"--peer {text!r}: {name} has no option {option!r}.", hint=f"Its options: {', '.join(sorted(known))}."
            )
        choices = known[option]
        if choices is not None and value not in choices:
            named = [str(each).lower() for each in choices]
            raise SettingsError(
                f"--peer {text!r}: {option} must be one of {', '.join(named)}.", hint=f"Such as {option}={named[0]}."
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
