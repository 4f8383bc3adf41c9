"""What an author declares about a backend before it is checked."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from visionaccel.core.comparison import FLOAT32_ERROR
from visionaccel.encoder import WantedIsolation

Source: TypeAlias = Callable[[Path, Path], Path]
"""Makes what the backend opens, such as a bundle of fixed grids. Takes the checkpoint's folder and a folder that does
not exist yet, and returns the folder to open. Must be a function of a module, so that other processes can import it.
Raises ConfigurationError for a tower that the backend does not support: the checks of that tower then do not apply."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How close to the float32 reference embeddings must be.

    Attributes:
        lowest: The least cosine of any token.
        first_percentile: The least cosine of 99 % of the tokens.
        mean: The least mean cosine of the tokens.
        relative_error: The largest norm of all differences, as a share of the norm of the reference; deepstack levels
            are judged by themselves.
    """

    lowest: float
    first_percentile: float
    mean: float
    relative_error: float


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "float32": Tolerance(0.99999, 0.999995, 0.999998, FLOAT32_ERROR),
        "float16": Tolerance(0.9995, 0.9998, 0.9999, 0.02),
        "bfloat16": Tolerance(0.998, 0.9985, 0.999, 0.05),
        "int8": Tolerance(0.99, 0.992, 0.995, 0.12),
    }
)
"""By precision, as in `Capabilities.precision`. Correct programs stay well within them, and faults in single windows or
rows do not. A device that rounds float32 products to TF32 exceeds float32's; declare another."""


@dataclass(frozen=True, slots=True)
class KnownFailure:
    """A check that is expected to fail until the backend is fixed; the suite fails once it passes.

    Attributes:
        check: The check's name, such as `L3-processes`.
        since: When the failure was found.
        reason: Why it fails.
    """

    check: str
    since: datetime.date
    reason: str

    def __str__(self) -> str:
        return f"known since {self.since.isoformat()}: {self.reason}"


@dataclass(frozen=True)
class BackendUnderTest:
    """A backend, and how to check it.

    Attributes:
        device: One of its devices; None for its default.
        options: Its options by name.
        isolation: Where its sessions run, as for `open_encoder`.
        source: Makes what it opens from a checkpoint; None if it opens the checkpoint itself.
        capabilities: Required values of fields of `Capabilities`, by name.
        tolerances: Tolerances by precision that replace the kit's `TOLERANCES`.
        speed_floor: Least speed compared with the reference on this machine, as a ratio of median times: 0.5 for half
            as fast. None for no requirement, as for a simulator.
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
        """Return the tolerance for a precision; float32's for a precision without one."""
        return {**TOLERANCES, **self.tolerances}.get(precision, TOLERANCES["float32"])

    def stated(self, seed: int) -> dict[str, Any]:
        """Return how the backend was checked, as JSON for a report; `seed` is that of weights, patches and grids."""
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
        """Name, device and options as one short text, for reports."""
        options = "&".join(f"{name}={value}" for name, value in self.options.items())
        return self.backend + (f"/{self.device}" if self.device else "") + (f"?{options}" if options else "")
