"""Finds families by entry point: lists them without imports, and imports only that of a checkpoint's architecture."""

from __future__ import annotations

from collections.abc import Sequence

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.entry_points import ArchitectureEntries
from visionaccel.errors import PluginError, UnsupportedArchitectureError
from visionaccel.towers import Family, Tower

GROUP = "visionaccel.families"

_FAMILIES = ArchitectureEntries(GROUP, Family, shown="visionaccel.families.Family", what="family")


def supported_architectures() -> frozenset[str]:
    """Return the names of all architectures that installed families support."""
    return frozenset(_FAMILIES)


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


def family_for(architecture: str) -> Family:
    """Return the family of an architecture. Raises the errors of `family_of`."""
    return _family_of_any([architecture], "this model")


def _family_of_any(architectures: Sequence[str], where: str) -> Family:
    for architecture in architectures:
        if architecture in _FAMILIES:
            return _FAMILIES[architecture]
    named = ", ".join(architectures)
    why = f"its architecture is {named}" if named else "its config.json lists no architecture"
    raise UnsupportedArchitectureError(f"{where} has an unsupported vision tower: {why}.", hint=_known())


def family_named(name: str) -> Family:
    """Return the family of that name; third-party families that cannot be imported are skipped.

    Raises:
        PluginError: If one of visionaccel's own families cannot be loaded.
        UnsupportedArchitectureError: If no installed family has that name.
    """
    for architecture in sorted(_FAMILIES, key=_FAMILIES.is_ours, reverse=True):
        try:
            family = _FAMILIES[architecture]
        except PluginError:
            if _FAMILIES.is_ours(architecture):
                raise
            continue
        if family.name == name:
            return family
    raise UnsupportedArchitectureError(f"unknown tower family {name!r}.", hint=_known())


def _known() -> str:
    listed = ", ".join(sorted(_FAMILIES))
    return f"Supported: {listed}." if listed else "visionaccel's own families are not registered; reinstall it."
