"""Families by entry point: listed without importing any, imported when a checkpoint of their architecture is opened.

An entry point of the group `visionaccel.families` is named as the architecture that a `config.json` states, and refers
to a `Family`; a family of several architectures has one for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from visionaccel.core.containment import contained
from visionaccel.errors import PluginError, UnsupportedArchitectureError
from visionaccel.towers import Family

GROUP = "visionaccel.families"
_OURS = "visionaccel"


def supported_architectures() -> frozenset[str]:
    """Every architecture name that an installed family takes."""
    return frozenset(_points())


def family_of_any(architectures: Iterable[str], where: str) -> Family:
    """The family of the first of some architectures that one is installed for.

    Args:
        architectures: What a checkpoint names.
        where: How errors name the checkpoint.

    Raises:
        PluginError: If the family cannot be imported, is not one, or two distributions provide it.
        UnsupportedArchitectureError: If there is none.
    """
    named = tuple(architectures)
    for architecture in named:
        if architecture in _points():
            return _load(architecture)
    raise UnsupportedArchitectureError(
        f"{where} is of architecture {', '.join(named) or 'none'}, whose vision tower is not implemented.",
        hint=_known(),
    )


def family_named(name: str) -> Family:
    """The family of that name. Those that cannot be imported are passed over.

    Raises:
        UnsupportedArchitectureError: If there is none.
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
    raise UnsupportedArchitectureError(f"towers of family {name!r} are not implemented.", hint=_known())


@cache
def _points() -> Mapping[str, tuple[EntryPoint, ...]]:
    """The installed entry points by architecture."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=GROUP):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def _known() -> str:
    listed = ", ".join(sorted(_points()))
    return f"Supported: {listed}." if listed else "visionaccel's own families are not registered; install it again."


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
            hint="The entry point must refer to one.",
        )
    return family


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def _origin(point: EntryPoint) -> str:
    return f"{_distribution(point)} {point.dist.version}" if point.dist is not None else _distribution(point)
