"""What an author says of a backend before it is checked."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from visionaccel.encoder import WantedIsolation

Source: TypeAlias = Callable[[Path, Path], Path]
"""Makes what the backend opens, such as a bundle of fixed grids: from a checkpoint's folder and a folder that does not
exist yet, to the folder to open. A function of a module, so that other processes find it."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How near to the float32 reference embeddings must be. Cosines are of tokens.

    Attributes:
        lowest: The lowest cosine must reach it.
        first_percentile: The cosine that 99 % of the tokens reach must reach it.
        mean: The mean cosine must reach it.
        relative_error: Most that the norm of all differences may be, as a share of the norm of the reference.
    """

    lowest: float
    first_percentile: float
    mean: float
    relative_error: float


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "float32": Tolerance(0.99999, 0.999995, 0.999998, 2e-3),
        "float16": Tolerance(0.9995, 0.9998, 0.9999, 0.02),
        "bfloat16": Tolerance(0.998, 0.9985, 0.999, 0.05),
        "int8": Tolerance(0.99, 0.992, 0.995, 0.12),
    }
)
"""By precision, as `Capabilities.precision` names it. What right programs reach with room to spare, and faults in
single windows or rows do not."""


@dataclass(frozen=True, slots=True)
class KnownFailure:
    """A check that fails, and is meant to until it is mended: once it passes, the suite fails.

    Attributes:
        check: The check's name, such as `L3-processes`.
        since: When that was found.
        reason: Why it fails.
    """

    check: str
    since: datetime.date
    reason: str

    def __str__(self) -> str:
        return f"known since {self.since.isoformat()}: {self.reason}"


@dataclass(frozen=True)
class BackendUnderTest:
    """A backend, and how it is to be checked.

    Attributes:
        backend: Its name.
        device: One of its devices; None for its default.
        options: Its options by name.
        isolation: Where its sessions live, as for `open_encoder`.
        source: Makes what it opens from a checkpoint; None if it opens the checkpoint itself.
        capabilities: What its sessions must say of themselves: some fields of `Capabilities` by name.
        tolerances: How near to the reference it is, by precision, where that is not the kit's `TOLERANCES`.
        known_failures: What fails.
        speed_floor: Least speed compared with the reference on this machine, as a ratio of median times: 0.5 for half
            as fast. None for no such claim, as for a simulator.
    """

    backend: str
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    isolation: WantedIsolation = "auto"
    source: Source | None = None
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    known_failures: tuple[KnownFailure, ...] = ()
    speed_floor: float | None = 0.5

    def tolerance(self, precision: str) -> Tolerance:
        """How near to the reference embeddings of a precision must be; as float32's where none is stated."""
        return {**TOLERANCES, **self.tolerances}.get(precision, TOLERANCES["float32"])

    def stated(self, seed: int) -> dict[str, Any]:
        """What a report says of how the backend was checked, as JSON has it.

        Args:
            seed: Of the weights, patches and grids.
        """
        return {
            "isolation": self.isolation,
            "source": None if self.source is None else f"{self.source.__module__}.{self.source.__qualname__}",
            "capabilities": {name: str(value) for name, value in self.capabilities.items()},
            "tolerances": {precision: asdict(tolerance) for precision, tolerance in self.tolerances.items()},
            "speed_floor": self.speed_floor,
            "seed": seed,
        }

    @property
    def label(self) -> str:
        """Name, device and options in a few words, for reports."""
        options = "&".join(f"{name}={value}" for name, value in self.options.items())
        return self.backend + (f"/{self.device}" if self.device else "") + (f"?{options}" if options else "")
