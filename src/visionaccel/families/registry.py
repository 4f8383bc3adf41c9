"""Finds families by entry point: lists them without imports, and imports only that of a checkpoint's architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.containment import contained
from visionaccel.errors import PluginError, UnsupportedArchitectureError
from visionaccel.towers import Family, Tower

GROUP = "visionaccel.families"
_OURS = "visionaccel"


def supported_architectures() -> frozenset[str]:
    """Return the names of all architectures that installed families support."""
    return frozenset(_points())


def tower_of(checkpoint: Checkpoint) -> Tower:
    """Return the vision tower of a checkpoint.

    Raises:
        CheckpointError: If its configuration is incomplete or impossible.
        PluginError: If the family cannot be imported, is not a Family, or two distributions provide it.
        UnsupportedArchitectureError: If no family supports the checkpoint's architectures, or the configuration asks
            for something that is not implemented.
    """
    return Tower(family_of(checkpoint), checkpoint)


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family of the first of a checkpoint's architectures that has one.

    Raises:
        PluginError: If the family cannot be imported, is not a Family, or two distributions provide it.
        UnsupportedArchitectureError: If no family supports the checkpoint's architectures.
    """
    return _family_of_any(checkpoint.architectures, str(checkpoint.folder))


def weight_prefixes(architectures: Iterable[str]) -> tuple[str, ...]:
    """Return the prefixes of vision tensors in checkpoints of these architectures. Raises the errors of `family_of`."""
    families = (_family_of_any([name], "a checkpoint") for name in architectures)
    return tuple(dict.fromkeys(prefix for family in families for prefix in family.prefixes))


def _family_of_any(architectures: Sequence[str], where: str) -> Family:
    for architecture in architectures:
        if architecture in _points():
            return _load(architecture)
    named = ", ".join(architectures)
    why = f"its architecture is {named}" if named else "its config.json lists no architecture"
    raise UnsupportedArchitectureError(f"{where} has an unsupported vision tower: {why}.", hint=_known())


def family_named(name: str) -> Family:
    """Return the family of that name; third-party families that cannot be imported are skipped.

    Raises:
        PluginError: If one of visionaccel's own families cannot be loaded.
        UnsupportedArchitectureError: If no installed family has that name.
    """
    for architecture, points in sorted(_points().items(), key=lambda each: _distribution(each[1][0]) != _OURS):
        try:
            family = _load(architecture)
        except PluginError:
            if _distribution(points[0]) == _OURS:
                raise
            continue
        if family.name == name:
            return family
    raise UnsupportedArchitectureError(f"unknown tower family {name!r}.", hint=_known())


@cache
def _points() -> Mapping[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=GROUP):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def _known() -> str:
    listed = ", ".join(sorted(_points()))
    return f"Supported: {listed}." if listed else "visionaccel's own families are not registered; reinstall it."


@cache
def _load(architecture: str) -> Family:
    point, *others = _points()[architecture]
    if others:
        raise PluginError(
            f"the vision tower of architecture {architecture} is provided by both {_origin(point)} and "
            f"{_origin(others[0])}.",
            hint="Uninstall one of them.",
        )
    try:
        with contained():
            family = point.load()
    except Exception as error:  # the user must learn which distribution raised it
        raise PluginError(
            f"the family {point.value} of {_origin(point)}, for architecture {architecture}, cannot be loaded: "
            f"{type(error).__name__}: {error}",
            hint=f"Reinstall {_distribution(point)}, or report this to its authors.",
        ) from error
    if not isinstance(family, Family):
        raise PluginError(
            f"the family {point.value} of {_origin(point)}, for architecture {architecture}, is not a "
            "visionaccel.families.Family.",
            hint="The entry point must refer to a Family.",
        )
    return family


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def _origin(point: EntryPoint) -> str:
    return f"{_distribution(point)} {point.dist.version}" if point.dist is not None else _distribution(point)
