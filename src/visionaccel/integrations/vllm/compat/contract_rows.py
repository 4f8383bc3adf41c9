"""Rows of the contract with vLLM: a name, how it is used, what must be true of it; and the features that they serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

__all__ = ["WITHOUT", "AnyOf", "Entry", "Feature", "Need", "Use", "need", "needs"]

Use: TypeAlias = Literal["call", "read", "subclass", "override", "patch"]
"""How a name is used: called, read, subclassed, overridden in such a subclass, or replaced by a function of ours."""


class Feature(StrEnum):
    """A part of the integration that is on or off as a whole."""

    INLINE = "in-line"
    FITTING = "fitting"
    CONTAINMENT = "containment"
    PIPELINED = "pipelined"
    REASONS = "reasons"
    METRICS = "metrics"
    POOLING = "pooling"


WITHOUT = {
    Feature.INLINE: "vLLM does not start with VISIONACCEL_BACKEND set",
    Feature.FITTING: "vLLM does not start with a bundle whose programs take some image sizes only",
    Feature.CONTAINMENT: "an image that cannot be encoded in the engine's step ends the engine, and what was computed "
    "from a device that answered wrongly is not discarded",
    Feature.PIPELINED: "images are encoded in the engine's step",
    Feature.REASONS: "clients get vLLM's own error for a failed image; the reason is in the log only",
    Feature.METRICS: "the metrics of the encoder are not in /metrics",
    Feature.POOLING: "vLLM does not start with a pooling model",
}
"""What happens without each feature."""


@dataclass(frozen=True, slots=True)
class Need:
    """One name of vLLM, and what must be true of it.

    Attributes:
        use: How it is used.
        target: `module:Class.attribute`.
        parameters: Parameters that it must take. Another one without a default breaks the contract too where it is
            called or overridden.
        attributes: Attributes of its instances: fields, class attributes, or what its constructor sets.
        mentions: Names that its code, or that of one of a class's methods, must use.
        implements: Methods that a subclass of ours has; another abstract one breaks the contract.
        optional: Used where it exists; nothing is missing without it.
        where_loaded: Looked at only in a process that has loaded the module: others never use it, and would import it
            for nothing.
    """

    use: Use
    target: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    implements: tuple[str, ...] = ()
    optional: bool = False
    where_loaded: bool = False

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def name(self) -> str:
        """Dotted name in the module."""
        return self.target.partition(":")[2]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Ways to the same end. The first whose needs all hold is taken.

    Attributes:
        end: What for.
        ways: The ways, by a short name.
    """

    end: str
    ways: Mapping[str, tuple[Need, ...]]


Entry: TypeAlias = Need | AnyOf


def needs(entry: Entry) -> tuple[Need, ...]:
    """The names of an entry, all ways together."""
    if isinstance(entry, Need):
        return (entry,)
    return tuple(each for way in entry.ways.values() for each in way)


def need(
    use: Use,
    target: str,
    parameters: str = "",
    *,
    has: str = "",
    mentions: str = "",
    implements: str = "",
    optional: bool = False,
    where_loaded: bool = False,
) -> Need:
    """A need whose names are given as words.

    Args:
        use: As `Need`, and so are the others.
        target: `module:Class.attribute`.
        parameters: Its parameters.
        has: Its attributes.
        mentions: What its code uses.
        implements: Abstract methods that a subclass of ours has.
        optional: Used where it exists.
        where_loaded: Looked at only in a process that has loaded the module.
    """
    takes, attributes, used, methods = (tuple(text.split()) for text in (parameters, has, mentions, implements))
    return Need(use, target, takes, attributes, used, methods, optional, where_loaded)
