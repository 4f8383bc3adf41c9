"""What the two processes tell each other. Arrays are not among it: they lie in shared memory."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from visionaccel.backends import Capabilities
from visionaccel.errors import DeviceError, VisionAccelError
from visionaccel.isolation.shared_arrays import ArrayPlace
from visionaccel.program import Program

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
        pickled: The error; bytes, because its class may be one that the other process cannot import.
        text: What it says.
        trace: Where it was raised, for people.
    """

    pickled: bytes
    text: str
    trace: str

    @classmethod
    def of(cls, error: VisionAccelError, trace: str) -> Failure:
        """The message that carries an error, as a DeviceError if its class does not survive pickling."""
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)  # noqa: S301 - its own bytes
        except Exception:
            pickled = pickle.dumps(DeviceError(f"{type(error).__name__}: {error.message}", hint=error.hint))
        return cls(pickled, str(error), trace)

    def error(self) -> VisionAccelError:
        """The error, of the type it was raised with, and with the child's traceback as a note."""
        try:
            found: object = pickle.loads(self.pickled)  # noqa: S301 - from the child, which runs this user's code
        except Exception:
            found = None
        error = found if isinstance(found, VisionAccelError) else DeviceError(self.text)
        error.add_note(f"In the device's process:\n{self.trace}")
        return error


Answer: TypeAlias = Opened | Places | Failure
"""What the child may send."""
