"""Grids: the number of patches of an image or video in time, height and width."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Self, SupportsIndex

from visionaccel.core.safe_text import one_line
from visionaccel.errors import GridError


@dataclass(frozen=True, slots=True, order=True)
class Grid:
    """Patches of one image (t = 1) or video: `t` temporal steps of `h` x `w` patches.

    Raises:
        GridError: If a size is not a positive integer.
    """

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        for name in ("t", "h", "w"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise GridError(
                    f"grid (t={self.t!r}, h={self.h!r}, w={self.w!r}): {name} must be a positive integer.",
                    hint="Pass the image_grid_thw that the processor returned with the patches.",
                )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `HxW` (one image) or `TxHxW`, in patches.

        Raises:
            GridError: If the text has neither form.
        """
        sizes = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x(\d{1,6})", text.strip().lower(), re.ASCII)
        if sizes is None:
            raise GridError(f"{text!r} is not a grid.", hint="Write height x width in patches, such as 58x74.")
        t, h, w = sizes.groups(default="1")
        return cls(int(t), int(h), int(w))

    @property
    def thw(self) -> tuple[int, int, int]:
        """(t, h, w), a row of `grid_thw` as models take it."""
        return self.t, self.h, self.w

    @property
    def frame(self) -> Grid:
        """The grid of one frame; the grid itself for a still image."""
        return self if self.t == 1 else Grid(1, self.h, self.w)

    @property
    def patches(self) -> int:
        """Number of patches, each a row of the patches array: t * h * w."""
        return self.t * self.h * self.w

    def tokens(self, merge_size: int) -> int:
        """Return the number of tokens, each a row of the embeddings: patches / merge_size**2.

        Raises:
            GridError: If height or width is not divisible by `merge_size`.
        """
        self.check_divisible(merge_size)
        return self.patches // merge_size**2

    def check_divisible(self, merge_size: int) -> None:
        """Raise GridError unless height and width are multiples of `merge_size`."""
        if self.h % merge_size or self.w % merge_size:
            raise GridError(
                f"grid {self}: height and width must be divisible by the merge size {merge_size}.",
                hint=f"Resize the image so that its sides are multiples of patch size x {merge_size} pixels; "
                "the model's own processor does so.",
            )

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"


_WANTED = "Pass grids as an integer array of shape [images, 3]."
_SHOWN = 60

GridLike = Grid | Sequence[SupportsIndex]


def as_grids(grids: Iterable[GridLike] | Any, merge_size: int = 1) -> tuple[Grid, ...]:
    """Convert an integer `[n, 3]` array or tensor, a list of triples, or a list of `Grid` to grids, and check them.

    Args:
        grids: One (t, h, w) in patches for each image or video.
        merge_size: Height and width must be divisible by it.

    Raises:
        GridError: If no grids are given, or one is malformed or not divisible.
    """
    rows = grids.tolist() if hasattr(grids, "tolist") else grids
    if not isinstance(rows, Iterable):
        raise GridError(f"grids are {one_line(repr(rows), _SHOWN)}, not triples (t, h, w).", hint=_WANTED)
    rows = list(rows)
    if not rows:
        raise GridError("no grid was given.", hint="Pass one (t, h, w) for each image or video.")
    checked = []
    for row in rows:
        if not isinstance(row, Grid):
            row = row.tolist() if hasattr(row, "tolist") else row
            if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 3:
                raise GridError(f"grid {one_line(repr(row), _SHOWN)} is not a triple (t, h, w).", hint=_WANTED)
            row = Grid(*map(_integer, row))
        row.check_divisible(merge_size)
        checked.append(row)
    return tuple(checked)


def _integer(size: Any) -> Any:
    """Convert numpy's and torch's integers to `int`; return anything else unchanged, for `Grid` to refuse."""
    try:
        return index(size)
    except TypeError:
        return size


def total_patches(grids: Iterable[Grid]) -> int:
    """Return the number of patches of all grids together."""
    return sum(grid.patches for grid in grids)
