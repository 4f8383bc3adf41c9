"""Families of vision towers: one package each, found by the architecture a checkpoint names."""

from visionaccel.checkpoint import Checkpoint
from visionaccel.errors import UnsupportedArchitectureError
from visionaccel.families.base import Family, Host, Tower
from visionaccel.families.qwen2_5_vl import Qwen25VL

__all__ = ["FAMILIES", "Family", "Host", "Tower", "supported_architectures", "tower_of"]

FAMILIES: tuple[Family, ...] = (Qwen25VL(),)


def supported_architectures() -> frozenset[str]:
    """Every architecture name that some family takes."""
    return frozenset().union(*(family.architectures for family in FAMILIES))


def tower_of(checkpoint: Checkpoint) -> Tower:
    """The vision tower of a checkpoint.

    Raises:
        UnsupportedArchitectureError: If no family takes the checkpoint's architecture.
        CheckpointError: If its configuration is incomplete or its weights do not fit it.
    """
    for family in FAMILIES:
        if family.architectures.intersection(checkpoint.architectures):
            return family.tower(checkpoint)
    named = ", ".join(checkpoint.architectures) or "none"
    raise UnsupportedArchitectureError(
        f"{checkpoint.folder} is of architecture {named}, whose vision tower is not implemented.",
        hint=f"Supported: {', '.join(sorted(supported_architectures()))}.",
    )
