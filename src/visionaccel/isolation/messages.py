"""What the two processes tell each other. Arrays are not among it: they lie in shared memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from visionaccel.backends import Capabilities
from visionaccel.core.program import Program
from visionaccel.isolation.shared_arrays import ArrayPlace

__all__ = ["Answer", "Failure", "OpenRequest", "Opened", "Places", "Surroundings"]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the child takes over from its parent before anything else is imported or unpickled.

    Attributes:
        search_path: The parent's `sys.path`, without empty entries.
        python_path: The parent's variable PYTHONPATH; None where it is not set.
        log_level: The lowest level of log records that the parent wants.
    """

    search_path: tuple[str, ...]
    python_path: str | None
    log_level: int


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What to open.

    Attributes:
        backend: The backend's name.
        program: The program; weights are referred to by their files.
        device: The backend's device; None for its default.
        options: The options that were given, by name.
    """

    backend: str
    program: Program
    device: str | None
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Opened:
    """The session is open."""

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class Places:
    """Where arrays of a call lie: its inputs as a request, its outputs as an answer.

    Attributes:
        arrays: Their places.
        writing_seconds: How long the child took to put an answer there.
    """

    arrays: tuple[ArrayPlace, ...]
    writing_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of a process that lives on.

    Attributes:
        kinds: Its classes as `module:name`, the nearest first; the other process may not have loaded each.
        message: What was wrong and where.
        hint: What to do about it.
        trace: Where it was raised, for people.
    """

    kinds: tuple[str, ...]
    message: str
    hint: str | None
    trace: str


Answer: TypeAlias = Opened | Places | Failure
"""What the child may send; see `answers` for how."""
