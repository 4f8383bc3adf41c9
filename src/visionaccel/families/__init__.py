"""Families of vision towers: one module each, found by the architecture a checkpoint names."""

from collections.abc import Iterable

from visionaccel.checkpoint import Checkpoint
from visionaccel.families.registry import GROUP, family_named, family_of_any, supported_architectures
from visionaccel.towers import Family, Host, Tower

__all__ = [
    "GROUP",
    "Family",
    "Host",
    "Tower",
    "family_named",
    "family_of",
    "supported_architectures",
    "tower_of",
    "weight_prefixes",
]


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that takes a checkpoint.

    Raises:
        PluginError: If the family is installed and cannot be loaded.
        UnsupportedArchitectureError: If no family takes the checkpoint's architecture.
    """
    return family_of_any(checkpoint.architectures, str(checkpoint.folder))


def weight_prefixes(architectures: Iterable[str]) -> tuple[str, ...]:
    """What the names of vision tensors start with in checkpoints of some architectures.

    Raises:
        PluginError: As `family_of`.
        UnsupportedArchitectureError: Likewise.
    """
    families = (family_of_any([name], "a checkpoint") for name in architectures)
    return tuple(dict.fromkeys(prefix for family in families for prefix in family.prefixes))


def tower_of(checkpoint: Checkpoint) -> Tower:
    """The vision tower of a checkpoint.

    Raises:
        CheckpointError: If its configuration is incomplete or impossible.
        PluginError: As `family_of`.
        UnsupportedArchitectureError: Likewise, or if the configuration asks for something that is not implemented.
    """
    return Tower(family_of(checkpoint), checkpoint)
