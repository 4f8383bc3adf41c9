"""What is checked: a backend and the files that it opens, as every process of a check gets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.backends import Registry
from visionaccel.core.grid import Grid, total_patches
from visionaccel.core.program import AnyGrid, Coverage, FixedGrid
from visionaccel.encoder import Encoder, WantedIsolation, open_encoder, open_source
from visionaccel_testing.checkpoints import TINY

PATCH_WIDTH = TINY["in_channels"] * TINY["temporal_patch_size"] * TINY["patch_size"] ** 2
"""Values of a patch of the kit's small towers."""

WINDOW_SIDE = TINY["window_size"] // TINY["patch_size"]
"""Patches along a side of one of their attention windows."""

DEADLINE = 20.0
"""Seconds of a call in a child process."""

_ANY = (
    (Grid(1, 16, 12),),  # whole windows and partial ones
    (Grid(1, 2, 2),),  # a single token
    (Grid(1, 10, 22), Grid(1, 22, 10)),  # partial windows on both sides
    (Grid(3, 6, 4), Grid(1, 4, 18)),  # a video with an image
    (Grid(1, 24, 24),),
)
"""Calls that show faults in windows, frames and neighbours, for programs that take any grid."""

_SIDES = (2, 4, 6, 8, 10, 12, 16, 20, 24, 32)


@dataclass(frozen=True)
class Subject:
    """A backend on the programs of one checkpoint. Can be sent to another process.

    Attributes:
        backend: Its name.
        device: One of its devices, or None.
        options: Its options by name.
        isolation: Where its sessions live.
        source: What it opens.
        checkpoint: The float32 checkpoint that this was made from.
        seed: Of generated patches and grids.
    """

    backend: str
    device: str | None
    options: Mapping[str, Any]
    isolation: WantedIsolation
    source: Path
    checkpoint: Path
    seed: int

    def open(
        self,
        *,
        isolation: WantedIsolation | None = None,
        registry: Registry | None = None,
        deadline: float = DEADLINE,
    ) -> Encoder:
        """A new encoder, which the caller closes.

        Args:
            isolation: Another isolation than its own.
            registry: Where the backend is found.
            deadline: Seconds of a call in a child process.
        """
        return open_encoder(
            open_source(self.source),
            backend=self.backend,
            device=self.device,
            options=self.options,
            registry=registry or Registry(),
            isolation=isolation or self.isolation,
            deadline=deadline,
        )

    def at(self, source: Path, checkpoint: Path) -> Subject:
        """The same backend on other files."""
        return replace(self, source=source, checkpoint=checkpoint)


def patches_for(grids: tuple[Grid, ...] | list[Grid], seed: int, width: int = PATCH_WIDTH) -> NDArray[np.float32]:
    """Random float32 patches [P, width]; the same for the same grids and seed."""
    key = [seed, *(size for grid in grids for size in (grid.t, grid.h, grid.w))]
    return np.random.default_rng(key).standard_normal((total_patches(grids), width), dtype=np.float32)


def grids_of(encoder: Encoder) -> tuple[tuple[Grid, ...], ...]:
    """Calls that an encoder's programs take: one or several grids each."""
    coverages = tuple(opened.program.coverage for opened in encoder.programs)
    if any(isinstance(coverage, AnyGrid) for coverage in coverages):
        return tuple(call for call in _ANY if all(_taken(encoder, coverages, grid) for grid in call))
    fixed = [coverage.grid for coverage in coverages if isinstance(coverage, FixedGrid)]
    within = [grid for h in _SIDES for w in _SIDES if _taken(encoder, coverages, grid := Grid(1, h, w))]
    within = [grid for grid in within if grid not in fixed]
    # Of the many grids in a bucket, some of each size.
    chosen = [*fixed, *within[:: max(1, len(within) // 6)]]
    calls: list[tuple[Grid, ...]] = [(grid,) for grid in chosen]
    return (*calls, (chosen[0], chosen[-1]), (Grid(2, chosen[0].h, chosen[0].w),))


def _taken(encoder: Encoder, coverages: tuple[Coverage, ...], grid: Grid) -> bool:
    return any(encoder.tower.fits(coverage, grid.frame) for coverage in coverages)
