"""Families of vision towers: one module each, found by the architecture that a checkpoint names."""

from visionaccel.families.registry import (
    GROUP,
    family_for,
    family_named,
    family_of,
    supported_architectures,
    tower_of,
)
from visionaccel.towers import Family, Host, Tower

__all__ = [
    "GROUP", "Family", "Host", "Tower", "family_for", "family_named", "family_of", "supported_architectures",
    "tower_of",
]  # fmt: skip
