"""Fits images to the grids that programs of fixed shapes take, before the image processor runs."""

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
from visionaccel.images.loading import ImageProcessor, as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

FitPolicy: TypeAlias = Literal["letterbox", "stretch"]
"""How the aspect ratio of an image is changed: by padding at the right or bottom, or by distortion."""

MOST_ASPECT_RATIO = 200
"""The model's own processor refuses images beyond it too."""

_LOST_AREA, _ADDED_AREA = 0.5, 0.25


def grid_cost(height: int, width: int, natural: Grid, grid: Grid) -> float:
    """Return how badly a grid suits an image: 0 for its natural one.

    It is the distance of the aspect ratios plus a part of the distance of the areas, both as logarithms. Lost area
    costs detail and has twice the weight of added area, which costs time.
    """
    aspect = abs(math.log((grid.h / grid.w) / (height / width)))
    area = math.log(grid.patches / natural.patches)
    return aspect + (_ADDED_AREA * area if area > 0 else -_LOST_AREA * area)


@dataclass(frozen=True)
class Fitter:
    """Chooses a grid for each image and resizes images to it.

    Attributes:
        tower: The vision tower.
        coverages: The coverages of the open programs. If one of them takes any grid, no image is changed.
        policy: How the aspect ratio of an image is changed.
        min_pixels: The smallest area that the processor gives an image.
        max_pixels: The largest area that it gives an image.
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
        """The grid with the most patches that an image can get."""
        return max([*self.fixed, *map(self._fullest, self.coverages)], key=lambda grid: grid.patches)

    def check_bounds(self) -> None:
        """Raise a ConfigurationError if the processor would resize images that were fitted to a program.

        That is so if the area of the program's largest grid is outside the processor's bounds.
        """
        for coverage in self.coverages:
            pixels = self._fullest(coverage).patches * self.tower.patch_size**2
            if not self.min_pixels <= pixels <= self.max_pixels:
                raise ConfigurationError(
                    f"the program for {coverage} needs images of {pixels} pixels, but the processor makes images of "
                    f"{self.min_pixels} to {self.max_pixels}.",
                    hint="Set the processor's min_pixels and max_pixels (in vLLM with --mm-processor-kwargs), or "
                    "export programs for other grids.",
                )

    def natural(self, height: int, width: int) -> Grid:
        """Return the grid that the model's own processor gives an image of that size in pixels.

        As in transformers' `smart_resize` of Qwen2-VL, the sides are rounded to whole merged tokens, and the area is
        kept within the bounds.

        Raises:
            UnfitGridError: If the image has no pixels, or one side is more than 200 times the other.
        """
        if min(height, width) < 1:
            raise UnfitGridError(f"an image of {width}x{height} pixels is empty.", hint="Pass a different image.")
        if max(height, width) > MOST_ASPECT_RATIO * min(height, width):
            raise UnfitGridError(
                f"an image of {width}x{height} pixels has an aspect ratio over {MOST_ASPECT_RATIO}.",
                hint="Crop it; the model's own processor rejects it too.",
            )
        cell = self._cell
        rows, columns = round(height / cell), round(width / cell)
        if rows * columns * cell**2 > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / shrink / cell)) for side in (height, width))
        elif rows * columns * cell**2 < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / cell) for side in (height, width))
        return self._grid(rows, columns)

    def grid_for(self, height: int, width: int) -> Grid:
        """Return the grid for an image of that size in pixels.

        It is the natural one if a program takes it, else the cheapest by `grid_cost` of the fixed grids and of the
        bucket grids that are closest to the image's aspect ratio. Raises the errors of `natural`.
        """
        natural = self.natural(height, width)
        takers = [coverage for coverage in self.coverages if self.tower.fits(coverage, natural)]
        if any(isinstance(coverage, AnyGrid) for coverage in takers):
            return natural
        for grid in self.fixed:
            if self._size(grid) == (width, height):
                return grid  # so that fitting an image twice changes nothing
        if takers:
            return natural
        candidates, ratio = list(self.fixed), max(height, width) / min(height, width)
        for coverage in self.coverages:
            if not isinstance(coverage, FixedGrid):
                near = self._within(coverage, ratio, upright=height > width)
                candidates += [grid for grid in near if grid.patches * self.tower.patch_size**2 >= self.min_pixels]
        return min(candidates, key=lambda grid: (grid_cost(height, width, natural, grid), -grid.patches))

    def fit(self, image: Image) -> Image:
        """Resize an image to the size of its grid, in RGB; the same object if the processor gives it that grid anyway.

        Raises:
            InputError: If the image is damaged, or its mode cannot be converted.
            UnfitGridError: If no program accepts a grid for it.
        """
        grid = self.grid_for(image.height, image.width)
        if image.size == self._size(grid) or grid == self.natural(image.height, image.width):
            return image
        return _fitted(as_rgb(image), self._size(grid), self.policy)

    @property
    def _cell(self) -> int:
        """Side of a merged token in pixels."""
        return self.tower.patch_size * self.tower.merge_size

    def _size(self, grid: Grid) -> tuple[int, int]:
        """Width and height in pixels."""
        return grid.w * self.tower.patch_size, grid.h * self.tower.patch_size

    def _fullest(self, coverage: Coverage) -> Grid:
        """Return the largest grid that the processor can give an image for a program; of equals, the squarest."""
        if isinstance(coverage, FixedGrid):
            return coverage.grid
        grids = self._within(coverage, MOST_ASPECT_RATIO)
        return max(reversed(grids), key=lambda grid: grid.patches, default=self._grid(1, 1))

    def _within(self, bucket: Bucket | AnyGrid, ratio: float, *, upright: bool = False) -> list[Grid]:
        """Return the bucket's grid closest to a ratio of the sides for each length of the shorter side."""
        tokens = self.max_pixels // self._cell**2
        limit = bucket.patches if isinstance(bucket, Bucket) else bucket.most_patches
        if limit is not None:
            tokens = min(tokens, limit // self.tower.merge_size**2)
        found = []
        for short in range(1, math.isqrt(tokens) + 1):

            def too_long(long: int, short: int = short) -> bool:
                return not self.tower.fits(bucket, self._grid(short, long, upright=upright))

            wanted = min(max(short, round(short * ratio)), tokens // short, short * MOST_ASPECT_RATIO)
            lengths = range(short, wanted + 1)
            if fitting := bisect_left(lengths, True, key=too_long):
                found.append(self._grid(short, lengths[fitting - 1], upright=upright))
        return found

    def _grid(self, short: int, long: int, *, upright: bool = False) -> Grid:
        """Return the grid with these sides in tokens."""
        rows, columns = (long, short) if upright else (short, long)
        return Grid(1, rows * self.tower.merge_size, columns * self.tower.merge_size)


def fitter_for(
    tower: Tower, coverages: Iterable[Coverage], policy: FitPolicy | Literal["none"], processor: ImageProcessor
) -> Fitter | None:
    """Make what fits images to the programs of an encoder, before a checkpoint's processor; None for `none`.

    Raises:
        ConfigurationError: As for `Fitter.check_bounds`.
    """
    if policy == "none":
        return None
    fitter = Fitter(tower, tuple(coverages), policy, processor.min_pixels, processor.max_pixels)
    fitter.check_bounds()
    return fitter


def _fitted(image: Image, size: tuple[int, int], policy: FitPolicy) -> Image:
    """Return an RGB image at another width and height in pixels.

    A letterboxed image is scaled and placed at the top left, so that coordinates in it differ from the original's by
    one factor. The rest has the mean colour of the image's edge, which gives the faintest border.
    """
    from PIL import Image as pillow

    if policy not in get_args(FitPolicy):
        raise ConfigurationError(f"unknown policy {policy!r}.", hint=f"Choose {' or '.join(get_args(FitPolicy))}.")
    if policy == "stretch":
        return image.resize(size, pillow.Resampling.BICUBIC)
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = (max(1, min(size[0], round(image.width * scale))), max(1, min(size[1], round(image.height * scale))))
    scaled = image.resize(inner, pillow.Resampling.BICUBIC)
    pixels: np.ndarray[Any, Any] = np.asarray(scaled)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    canvas = pillow.new("RGB", size, tuple(int(value) for value in edge.mean(axis=0).round()))
    canvas.paste(scaled, (0, 0))
    return canvas
