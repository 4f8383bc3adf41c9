"""Whether an artifact was made from a checkpoint, and for which grid: what its window order and its kernel tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from visionaccel.bundle import MOST_PATCHES
from visionaccel.core.grid import Grid
from visionaccel.core.program import HostSplit
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import BundleError, ConfigurationError
from visionaccel.families import Tower
from visionaccel.towers import GROUPED, RASTER, window_order
from visionaccel_flexmlrt.vitisai.recognition import HostPart

_TOLERANCE = 1e-6
"""Of the largest element. Exporters that fold operators into a weight move its last float32 bits, by some 1e-7 of it;
training moves a weight by more than that in its first steps."""


def matching_grid(tower: Tower, window_index: NDArray[np.int64], wanted: Grid | None) -> tuple[Grid, HostSplit]:
    """The grid whose tokens come in that order, a permutation [tokens], and in which order its windows are.

    Raises:
        BundleError: If no grid has that order.
        ConfigurationError: If several have and none was chosen, or the chosen one has another.
    """
    tokens = len(window_index)
    if tokens * tower.merge_size**2 > MOST_PATCHES:
        raise BundleError(
            f"the model is for {tokens * tower.merge_size**2} patches; a program takes at most {MOST_PATCHES}.",
            hint="Compile the tower for a smaller grid.",
        )
    fitting: dict[Grid, HostSplit] = {}
    nearest, least = "none", tokens + 1
    for height in (each for each in range(1, tokens + 1) if tokens % each == 0):
        grid = Grid(1, height * tower.merge_size, tokens // height * tower.merge_size)
        # Where both orders are the same it is called raster, as the reference has it.
        orders = [window_order(tower.spec, [grid], grouped=grouped)[0] for grouped in (False, True)]
        differing = [int((each != window_index).sum()) for each in orders]
        if 0 in differing:
            fitting[grid] = HostSplit(GROUPED if differing[0] else RASTER)
        if min(differing) < least:
            nearest, least = f"{grid.h}x{grid.w}", min(differing)
    if not fitting:
        raise BundleError(
            f"the model's window order is that of no grid of {tokens} tokens; the nearest is {nearest}, which differs "
            f"in {least} places.",
            hint="Export the tower with transformers' window order, and compile it again.",
        )
    names = ", ".join(f"{grid.h}x{grid.w}" for grid in fitting)
    if wanted is not None:
        if wanted not in fitting:
            raise ConfigurationError(
                f"the artifact is not for grid {wanted.h}x{wanted.w}: its window order is that of {names}.",
                hint="Leave --grid out, or name one of these.",
            )
        return wanted, fitting[wanted]
    if len(fitting) > 1:
        raise ConfigurationError(
            f"grids {names} have the same window order, and nothing else in the model tells which it is for.",
            hint="Name the one that it was compiled for with --grid.",
        )
    return next(iter(fitting.items()))


def check_weights(part: HostPart, weights: Mapping[str, StoredTensor]) -> None:
    """Refuse an artifact whose host weights are not the checkpoint's; those that this lacks are not compared.

    Raises:
        BundleError: If one differs.
        CheckpointError: If one cannot be read.
    """
    for name, found in part.weights.items():
        stored = weights.get(name)
        if stored is None:
            continue
        exact = stored.read()
        difference = "it has another shape"
        if exact.shape == found.shape:
            ours, theirs = found.astype(np.float32), exact.astype(np.float32)
            if any(np.array_equal(ours, rounded.astype(np.float32)) for rounded in _roundings(theirs)):
                continue
            with np.errstate(all="ignore"):
                largest = float(np.abs(ours - theirs).max())
            if largest <= _TOLERANCE * float(np.abs(theirs).max()):
                continue
            difference = f"they differ by up to {largest:g}"
        raise BundleError(
            f"the artifact's {name} is not that of {stored.file}: {difference}. It was compiled from other weights.",
            hint="Pass the checkpoint that it was compiled from.",
        )


def narrowest(values: NDArray[Any]) -> NDArray[Any]:
    """The values in the narrowest float dtype that holds them exactly, as they were before an exporter widened them."""
    wide = values.astype(np.float32)
    exact = (each for each in reversed(_roundings(wide)) if np.array_equal(each.astype(np.float32), wide))
    return next(exact, wide)  # NaN equals nothing


def _roundings(values: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
    """Float32 values, and what they are in the narrower dtypes of exports, the preferred last."""
    with np.errstate(all="ignore"):
        return values, values.astype(np.float16), values.astype(ml_dtypes.bfloat16)
