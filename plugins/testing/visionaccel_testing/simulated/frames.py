"""The frames in a session's inputs, as far as these tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.program import Bucket, FixedGrid, Program

__all__ = ["Frame", "frames_of"]


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a call: an image, or one of a video's.

    Attributes:
        patches: Its patches, without padding.
        size: Its height and width in patches; None where the program does not get it.
        rows: Its part of the program's first input, a view: patches [patches, patch_width], or for a split program
            embedded patches [tokens, merged, hidden].
    """

    patches: int
    size: tuple[int, int] | None
    rows: Array


def frames_of(program: Program, inputs: Mapping[str, Array]) -> tuple[Frame, ...]:
    """The frames of one call, in their order.

    The grids are read from `grid_thw` or from the program's coverage. A program for any grid gets only the number of
    `frames`, which are of one size; `frame_bias` tells one for a bucket which patches are padding. A call that says
    nothing of its frames counts as one.

    Args:
        program: What is run; its first input has the patches.
        inputs: Inputs of one call.
    """
    rows = inputs[program.inputs[0].name]
    if "grid_thw" in inputs:
        sizes = [(int(h), int(w)) for t, h, w in as_numpy(inputs["grid_thw"]) for _ in range(int(t))]
        return _split(rows, [h * w for h, w in sizes], sizes)
    match program.coverage:
        case FixedGrid(grid=grid):
            return _split(rows, [grid.h * grid.w], [(grid.h, grid.w)])
        case Bucket() if "frame_bias" in inputs:
            return _split(rows, [int(np.count_nonzero(as_numpy(inputs["frame_bias"]) == 0))], [None])
    total = len(rows) * _merged(rows)
    frames = int(as_numpy(inputs["frames"])[0]) if "frames" in inputs else 1
    if frames < 1 or total % frames:
        frames = 1
    return _split(rows, [total // frames] * frames, [None] * frames)


def _split(rows: Array, counts: Sequence[int], sizes: Sequence[tuple[int, int] | None]) -> tuple[Frame, ...]:
    merged = _merged(rows)
    ends = [end // merged for end in np.cumsum(counts).tolist()]
    return tuple(
        Frame(count, size, rows[start:end])
        for count, size, start, end in zip(counts, sizes, [0, *ends], ends, strict=False)
    )


def _merged(rows: Array) -> int:
    """Patches in a row: embedded ones come with those of one token together."""
    return int(rows.shape[1]) if len(rows.shape) == 3 else 1
