"""The frames in a call of a simulated device, and how long the call takes."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.program import Bucket, FixedGrid, Program
from visionaccel.errors import SettingsError

_Size: TypeAlias = Annotated[str, Field(pattern=r"^[1-9][0-9]*x[1-9][0-9]*$")]
_Seconds: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_RECORDED = TypeAdapter(dict[_Size, Annotated[tuple[_Seconds, ...], Field(min_length=1)]])


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a call: an image, or one of a video's.

    Attributes:
        patches: The number of its patches, without padding.
        size: Its height and width in patches; None if the program does not receive it.
        rows: Its part of the program's first input, a view: patches [patches, patch_width], or embedded patches
            [tokens, merged, hidden] for a split program.
    """

    patches: int
    size: tuple[int, int] | None
    rows: Array


def frames_of(program: Program, inputs: Mapping[str, Array]) -> tuple[Frame, ...]:
    """Return the frames of one call, in order.

    Sizes are those of `grid_thw` or of the program's coverage. A program for any grid receives only the number of
    `frames`, which have the same size; one for a bucket receives `frame_bias`, which marks padding. A call with none of
    these counts as one frame.
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
    """Return how many patches are in a row of the input: embedded patches of one token share a row."""
    return int(rows.shape[1]) if len(rows.shape) == 3 else 1


class Latency:
    """The duration of each call. Safe to use from several threads.

    Args:
        fixed: Seconds added once to a call with frames that are not recorded.
        per_patch: Seconds of each patch of such frames.
        recorded: Measured seconds of frames by height and width in patches, used in turn. A frame without a size takes
            the times of the recorded ones with as many patches.
    """

    def __init__(self, fixed: float, per_patch: float, recorded: Mapping[tuple[int, int], Sequence[float]]) -> None:
        self._fixed, self._per_patch = fixed, per_patch
        times: dict[Hashable, list[float]] = defaultdict(list)
        for (h, w), seconds in sorted(recorded.items()):
            times[h, w] += seconds
            times[h * w] += seconds
        self._times = {key: itertools.cycle(seconds) for key, seconds in times.items()}
        self._lock = threading.Lock()

    def seconds(self, frames: Sequence[Frame]) -> float:
        """Return the seconds that the next call, with these frames, takes."""
        total, fixed = 0.0, 0.0
        for frame in frames:
            times = self._times.get(frame.patches if frame.size is None else frame.size)
            if times is not None:
                with self._lock:
                    total += next(times)
            else:
                total += self._per_patch * frame.patches
                fixed = self._fixed  # once for each call: batching saves the rest
        return total + fixed


def read_recorded(path: Path) -> dict[tuple[int, int], tuple[float, ...]]:
    """Read measured times by a frame's height and width from a JSON file such as `{"58x74": [7.4, 7.6]}`.

    Raises:
        SettingsError: If the file cannot be read or is malformed.
    """
    advice = 'Write {"HEIGHTxWIDTH": [SECONDS, ...], ...} with sizes in patches, such as {"58x74": [7.4, 7.6]}.'
    try:
        stated = _RECORDED.validate_json(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"recorded times {path} cannot be read: {error}.", hint=advice) from error
    except ValidationError as error:
        raise SettingsError(f"recorded times {path}: {problems_of(error)}.", hint=advice) from error
    sizes = ((name.partition("x"), seconds) for name, seconds in stated.items())
    return {(int(height), int(width)): seconds for (height, _, width), seconds in sizes}
