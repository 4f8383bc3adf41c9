"""Level 6: as fast, compared with the reference on this machine, as its author declares."""

from __future__ import annotations

import statistics
import time

from visionaccel.core.grid import Grid
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, TINY
from visionaccel_testing.conformance.check import CheckFailedError, Checks, NotApplicableError
from visionaccel_testing.conformance.kit import Kit, grids_of, patches_for

SPEED = Checks(6)

_ROUNDS = 4
_SMALL_7B = {
    **QWEN2_5_VL_7B,
    "depth": 2,
    "hidden_size": 320,
    "num_heads": 4,
    "intermediate_size": 856,
    "out_hidden_size": 896,
    "fullatt_block_indexes": [1],
}
"""Layers with a sixteenth of the 7B tower's products: a call takes little time, most of it for the products."""


@SPEED.add
def floor(kit: Kit) -> None:
    """Its median time is within the declared ratio of the reference's; both encode the same grid in turns."""
    wanted = kit.declared.speed_floor
    if wanted is None:
        raise NotApplicableError("its author declares no least speed.")
    config = _SMALL_7B if kit.declared.source is None else TINY
    subject = kit.subject_of("speed", config)
    width = config["in_channels"] * config["temporal_patch_size"] * config["patch_size"] ** 2
    reference = kit.reference_of(subject.checkpoint)
    with subject.open() as encoder:
        grid = Grid(1, 32, 32)
        if kit.declared.source is not None:
            grid = max((call[0] for call in grids_of(encoder)), key=lambda each: each.patches)
        grids = [grid]
        patches = patches_for(grids, kit.seed, width)
        seconds: dict[str, list[float]] = {"ours": [], "reference": []}
        for number in range(_ROUNDS + 1):
            for name, each in (("ours", encoder), ("reference", reference)):
                began = time.perf_counter()
                each.encode(patches, grids)
                if number:  # the first round is a warm-up
                    seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(seconds["reference"]) / statistics.median(seconds["ours"])
    kit.figures["speed_ratio"] = round(ratio, 3)
    if ratio < wanted:
        raise CheckFailedError(
            f"grid {grid}: {ratio:.2f} times as fast as the float32 reference; declared is {wanted:g}."
        )
