"""What is checked: a backend and the files that it opens, as every process of a check gets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.backends import Registry
from visionaccel.core.arrays import as_numpy
from visionaccel.core.grid import Grid, total_patches
from visionaccel.core.program import AnyGrid, Coverage, FixedGrid
from visionaccel.encoder import Encoder, WantedIsolation, open_encoder
from visionaccel_testing.checkpoints import TINY

PATCH_WIDTH = TINY["in_channels"] * TINY["temporal_patch_size"] * TINY["patch_size"] ** 2
"""Values of a patch of the kit's small towers."""

WINDOW_SIDE = TINY["window_size"] // TINY["patch_size"]
"""Patches along a side of one of their attention windows."""

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
    """A backend, how it is opened, and on what. Can be sent to another process.

    Attributes:
        source: What it opens: the checkpoint, or what was made from it.
        checkpoint: The float32 checkpoint.
        seed: Of generated patches and grids.
    """

    backend: str
    device: str | None
    options: Mapping[str, Any]
    isolation: WantedIsolation
    source: Path
    checkpoint: Path
    seed: int

    def open(self, *, isolation: WantedIsolation | None = None, deadline: float = 20.0) -> Encoder:
        """A new encoder, which the caller closes; an isolation that is given replaces the subject's own."""
        return open_encoder(
            self.source,
            backend=self.backend,
            device=self.device,
            options=self.options,
            registry=Registry(),
            isolation=isolation or self.isolation,
            deadline=deadline,
        )


def listed(grids: Sequence[Grid]) -> str:
    """Grids in a message."""
    return ", ".join(map(str, grids))


def patches_for(grids: Sequence[Grid], seed: int, width: int = PATCH_WIDTH) -> NDArray[np.float32]:
    """Random float32 patches [P, width]; the same for the same grids and seed."""
    key = [seed, *(size for grid in grids for size in grid.thw)]
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


def encoded(encoder: Encoder, patches: NDArray[Any], grids: Sequence[Grid]) -> NDArray[np.float32]:
    """A copy on the host of what an encoder makes of patches: sessions may return tensors of any device."""
    return np.array(as_numpy(encoder.encode(patches, grids)))


def first_call(encoder: Encoder, seed: int) -> Callable[[], NDArray[np.float32]]:
    """A function that encodes the first call that an encoder takes."""
    grids = grids_of(encoder)[0]
    patches = patches_for(grids, seed)
    return lambda: encoded(encoder, patches, grids)


def _taken(encoder: Encoder, coverages: tuple[Coverage, ...], grid: Grid) -> bool:
    return any(encoder.tower.fits(coverage, grid.frame) for coverage in coverages)
