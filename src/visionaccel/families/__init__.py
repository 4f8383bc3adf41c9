"""Families of vision towers: one module each, found by the architecture that a checkpoint names."""

from visionaccel.families.registry import (
    GROUP,
    family_named,
    family_of,
    supported_architectures,
    tower_of,
    weight_prefixes,
)
from visionaccel.towers import Family, Host, Tower

__all__ = [
    "GROUP", "Family", "Host", "Tower", "family_named", "family_of", "supported_architectures", "tower_of",
    "weight_prefixes",
]  # fmt: skip
