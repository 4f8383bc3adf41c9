"""Families of vision towers: one module each, found by the architecture a checkpoint names."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from visionaccel.checkpoint import Checkpoint
from visionaccel.errors import UnsupportedArchitectureError
from visionaccel.families import qwen2_5_vl
from visionaccel.towers import Family, Host, Tower

__all__ = [
    "FAMILIES", "Family", "Host", "Tower", "family_named", "family_of", "supported_architectures", "tower_of",
    "weight_prefixes",
]  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType({"Qwen2_5_VLForConditionalGeneration": qwen2_5_vl.FAMILY})


def supported_architectures() -> frozenset[str]:
    """Every architecture name that some family takes."""
    return frozenset(FAMILIES)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family that takes a checkpoint.

    Raises:
        UnsupportedArchitectureError: If no family takes the checkpoint's architecture.
    """
    for architecture in checkpoint.architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    named = ", ".join(checkpoint.architectures) or "none"
    raise UnsupportedArchitectureError(
        f"{checkpoint.folder} is of architecture {named}, whose vision tower is not implemented.",
        hint=f"Supported: {', '.join(sorted(supported_architectures()))}.",
    )


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        UnsupportedArchitectureError: If there is none.
    """
    for family in FAMILIES.values():
        if family.name == name:
            return family
    raise UnsupportedArchitectureError(
        f"towers of family {name!r} are not implemented.",
        hint=f"Known: {', '.join(sorted({family.name for family in FAMILIES.values()}))}.",
    )


def weight_prefixes(architectures: Iterable[str]) -> tuple[str, ...]:
    """What the names of vision tensors start with in checkpoints of some architectures."""
    return tuple(dict.fromkeys(prefix for name in architectures for prefix in FAMILIES[name].prefixes))


def tower_of(checkpoint: Checkpoint) -> Tower:
    """The vision tower of a checkpoint.

    Raises:
        UnsupportedArchitectureError: If no family takes the checkpoint's architecture.
        CheckpointError: If its configuration is incomplete or its weights do not fit it.
    """
    return Tower(family_of(checkpoint), checkpoint)
