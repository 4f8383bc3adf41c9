"""Fitting images to the grids that programs of fixed shapes take, before any processor sees them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, Bucket, Coverage, FixedGrid
from visionaccel.errors import ConfigurationError, UnfitGridError
from visionaccel.families import Tower

if TYPE_CHECKING:
    from PIL.Image import Image

FitPolicy: TypeAlias = Literal["letterbox", "stretch"]
"""How an image gets another aspect ratio: padded at the right or bottom, or distorted."""

MOST_ASPECT_RATIO = 200
"""Beyond it, the model's own processor refuses an image too."""

_LOST_AREA, _ADDED_AREA = 0.5, 0.25


def natural_grid(height: int, width: int, cell: int, min_pixels: int, max_pixels: int, merge: int) -> Grid:
    """The grid that the model's own processor gives an image: sides rounded to `cell`, area kept within bounds.

    The formula is transformers' `smart_resize` of Qwen2-VL.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        cell: Side of a merged token in pixels.
        min_pixels: Smallest area.
        max_pixels: Largest area.
        merge: Patches along a side of a merged token.

    Raises:
        UnfitGridError: If the image has no pixels, or one side is more than 200 times the other.
    """
    if min(height, width) < 1:
        raise UnfitGridError(f"an image of {width}x{height} pixels is empty.", hint="Pass an image with pixels.")
    if max(height, width) > MOST_ASPECT_RATIO * min(height, width):
        raise UnfitGridError(
            f"an image of {width}x{height} pixels has an aspect ratio of over {MOST_ASPECT_RATIO}.",
            hint="Crop it; the model's own processor refuses it too.",
        )
    rows, columns = round(height / cell), round(width / cell)
    if rows * columns * cell**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / cell)) for side in (height, width))
    elif rows * columns * cell**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / cell) for side in (height, width))
    return Grid(1, rows * merge, columns * merge)


def grid_cost(height: int, width: int, natural: Grid, grid: Grid) -> float:
    """How badly a grid suits an image: 0 for its own.

    It is the distance of the aspect ratios plus a part of the distance of the areas, both as logarithms. Area that is
    lost costs detail and weighs twice as much as area that is added, which costs time.
    """
    aspect = abs(math.log((grid.h / grid.w) / (height / width)))
    area = math.log(grid.patches / natural.patches)
    return aspect + (_ADDED_AREA * area if area > 0 else -_LOST_AREA * area)


def require_area(what: str, pixels: int, min_pixels: int, max_pixels: int) -> None:
    """Refuse what needs images of an area that the processor gives none.

    Raises:
        ConfigurationError: If the area lies outside the bounds.
    """
    if not min_pixels <= pixels <= max_pixels:
        raise ConfigurationError(
            f"{what} needs images of {pixels} pixels; the processor makes them of {min_pixels} to {max_pixels}.",
            hint="Set the processor's min_pixels and max_pixels, for vLLM with --mm-processor-kwargs, or export other "
            "grids.",
        )


@dataclass(frozen=True)
class Fitter:
    """Chooses a grid for each image and resizes images to it.

    Attributes:
        tower: The vision tower.
        coverages: What the open programs take. With a program for any grid, no image is changed.
        policy: How an image gets another aspect ratio.
        min_pixels: The processor's bound on the area of an image.
        max_pixels: The processor's bound on the area of an image.
    """

    tower: Tower
    coverages: tuple[Coverage, ...]
    policy: FitPolicy
    min_pixels: int
    max_pixels: int

    @property
    def fixed(self) -> tuple[Grid, ...]:
        """Grids of the programs with baked tables."""
        return tuple(coverage.grid for coverage in self.coverages if isinstance(coverage, FixedGrid))

    @property
    def largest(self) -> Grid:
        """The grid with most patches that an image can get."""
        return max([*self.fixed, *map(self._fullest, self._buckets)], key=lambda grid: grid.patches)

    def check_bounds(self) -> None:
        """Refuse programs that no image can get, because the processor would change the size of what was fitted.

        Raises:
            ConfigurationError: If the area of a fixed grid lies outside the processor's bounds, or a bucket is too
                small for the smallest.
        """
        side = self.tower.patch_size
        for coverage in self.coverages:
            grid = coverage.grid if isinstance(coverage, FixedGrid) else self._fullest(coverage)
            require_area(f"the program for {coverage}", grid.patches * side**2, self.min_pixels, self.max_pixels)

    def grid_for(self, height: int, width: int) -> Grid:
        """The grid that an image of that size in pixels gets.

        Its own, if a program takes it; else the cheapest by `grid_cost` of the fixed grids and of those in the buckets
        that come nearest to its aspect ratio.

        Raises:
            UnfitGridError: If the image is empty, or one side is more than 200 times the other.
        """
        patch, merge = self.tower.patch_size, self.tower.merge_size
        natural = natural_grid(height, width, patch * merge, self.min_pixels, self.max_pixels, merge)
        if any(isinstance(coverage, AnyGrid) and self.tower.fits(coverage, natural) for coverage in self.coverages):
            return natural
        for grid in self.fixed:
            if (grid.h * patch, grid.w * patch) == (height, width):
                return grid  # so that fitting what was fitted changes nothing
        if any(self.tower.fits(coverage, natural) for coverage in self.coverages):
            return natural
        candidates = [*self.fixed, *(grid for bucket in self._buckets for grid in self._within(bucket, height, width))]
        return min(candidates, key=lambda grid: (grid_cost(height, width, natural, grid), -grid.patches))

    def fit(self, image: Image) -> Image:
        """An RGB image at the size of its grid; the same object if the processor gives it that grid by itself."""
        grid = self.grid_for(image.height, image.width)
        patch, merge = self.tower.patch_size, self.tower.merge_size
        size = (grid.w * patch, grid.h * patch)
        own = natural_grid(image.height, image.width, patch * merge, self.min_pixels, self.max_pixels, merge)
        if image.size == size or grid == own:
            return image
        return _fitted(image, size, self.policy)

    @property
    def _buckets(self) -> Iterable[Bucket | AnyGrid]:
        return [coverage for coverage in self.coverages if not isinstance(coverage, FixedGrid)]

    def _within(self, bucket: Bucket | AnyGrid, height: int, width: int) -> list[Grid]:
        """Grids in a bucket as near as can be to an image's aspect ratio, one for each length of the shorter side."""
        ratio, upright = max(height, width) / min(height, width), height > width
        most, least = self._tokens(bucket), -(-self.min_pixels // (self.tower.patch_size * self.tower.merge_size) ** 2)
        found = []
        for short in range(1, math.isqrt(most) + 1):
            wanted = min(max(short, round(short * ratio)), most // short, short * MOST_ASPECT_RATIO)
            long = self._longest(bucket, short, wanted, upright=upright)
            if long >= short and short * long >= least:
                found.append(self._grid(short, long, upright=upright))
        return found

    def _longest(self, bucket: Bucket | AnyGrid, short: int, most: int, *, upright: bool) -> int:
        """The largest length of the long side, from `short` to `most` tokens, that the program takes; else less."""

        def too_long(long: int) -> bool:
            return not self.tower.fits(bucket, self._grid(short, long, upright=upright))

        return short - 1 + bisect_left(range(short, most + 1), True, key=too_long)

    def _grid(self, short: int, long: int, *, upright: bool) -> Grid:
        """A grid by its sides in tokens."""
        rows, columns = (long, short) if upright else (short, long)
        return Grid(1, rows * self.tower.merge_size, columns * self.tower.merge_size)

    def _tokens(self, bucket: Bucket | AnyGrid) -> int:
        """Most tokens of an image in a bucket, by its size and by the processor's largest area."""
        merge = self.tower.merge_size
        tokens = self.max_pixels // (self.tower.patch_size * merge) ** 2
        limit = bucket.patches if isinstance(bucket, Bucket) else bucket.most_patches
        return tokens if limit is None else min(tokens, limit // merge**2)

    def _fullest(self, bucket: Bucket | AnyGrid) -> Grid:
        """The grid with most patches in a bucket that the processor can give an image, the squarest of equals."""
        merge = self.tower.merge_size
        tokens = self._tokens(bucket)
        best = Grid(1, merge, merge)
        for rows in range(1, math.isqrt(tokens) + 1):
            most = min(tokens // rows, rows * MOST_ASPECT_RATIO)
            columns = self._longest(bucket, rows, most, upright=False)
            if columns >= rows and rows * columns * merge**2 >= best.patches:
                best = self._grid(rows, columns, upright=False)
        return best


def _fitted(image: Image, size: tuple[int, int], policy: FitPolicy) -> Image:
    """A new RGB image of that width and height; an unknown policy is a `ConfigurationError`."""
    if policy not in get_args(FitPolicy):
        raise ConfigurationError(f"there is no policy {policy!r}.", hint=f"Name {' or '.join(get_args(FitPolicy))}.")
    return _stretched(image, size) if policy == "stretch" else _letterboxed(image, size)


def _stretched(image: Image, size: tuple[int, int]) -> Image:
    from PIL.Image import Resampling

    return image.resize(size, Resampling.BICUBIC)


def _letterboxed(image: Image, size: tuple[int, int]) -> Image:
    """The image scaled to fit, at the top left, so that coordinates in it differ from the original's by one factor.

    The rest has the mean colour of the image's edge, which makes the faintest border.
    """
    from PIL import Image as pillow

    scale = min(size[0] / image.width, size[1] / image.height)
    inner = (max(1, min(size[0], round(image.width * scale))), max(1, min(size[1], round(image.height * scale))))
    scaled = _stretched(image, inner)
    pixels: np.ndarray[Any, Any] = np.asarray(scaled)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    canvas = pillow.new("RGB", size, tuple(int(value) for value in edge.mean(axis=0).round()))
    canvas.paste(scaled, (0, 0))
    return canvas
