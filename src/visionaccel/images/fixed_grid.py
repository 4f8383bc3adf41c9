"""Images to patches of one known grid: resized by the processor's own library, then normalised and cut in one pass.

The Hugging Face processor makes a copy of the image for each of its steps, two of them in float64. Where the grid is
known beforehand, what comes after resizing is a look-up and a reorder, and the result is the processor's bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.grid import Grid, GridLike, as_grids
from visionaccel.errors import ConfigurationError, GridError, InputError
from visionaccel.families import Tower
from visionaccel.images.fitting import FitPolicy, Fitter, check_policy, fitted, natural_grid, require_area
from visionaccel.images.reading import ImageBackend, ImageProcessor, as_rgb, image_processor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FittingProcessor", "FixedGridProcessor", "fixed_grid_processor"]


class FixedGridProcessor:
    """Makes patches of images, all at one grid. Threads may share it.

    An image that the checkpoint's processor gives this grid by itself becomes the patches that it makes of it. Any
    other becomes those that it makes of the image as `Fitter` fits it to this grid.

    Attributes:
        grid: The grid of every image.
        patch_width: Width of a row of patches.

    Args:
        processor: The checkpoint's image processor.
        grid: One frame's, in patches.
        policy: How an image gets another aspect ratio.

    Raises:
        GridError: If the grid is not one frame's, or not divisible by the merge size.
        ConfigurationError: If there is no such policy, the grid's area lies outside the processor's bounds, or the
            processor does more than to resize with the bicubic filter, to normalise and to make patches.
    """

    def __init__(self, processor: ImageProcessor, grid: GridLike, policy: FitPolicy = "letterbox") -> None:
        check_policy(policy)
        (self.grid,) = as_grids([grid], processor.merge_size)
        if self.grid.t != 1:
            raise GridError(f"grid {self.grid} is a video's.", hint="Pass the grid of one image, such as 58x74.")
        side = processor.patch_size
        bounds = processor.min_pixels, processor.max_pixels
        require_area(f"grid {self.grid}", self.grid.patches * side**2, *bounds)
        self._processor, self._levels, self._policy = processor, processor.levels, policy
        self._size = self.grid.w * side, self.grid.h * side
        self.patch_width = self._levels.patch_width

    def __call__(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Patches of images, one after the other.

        Args:
            images: Pillow's, in any mode and size; they are not changed.

        Returns:
            float32 [images * grid.patches, patch_width], C-contiguous; the caller's own.

        Raises:
            InputError: If there is none, or one cannot be read.
            UnfitGridError: If one is empty, or one of its sides is more than 200 times the other.
        """
        if not isinstance(images, Sequence) or not images:
            raise InputError("no sequence of images was given.", hint="Pass a list of at least one image.")
        patches = np.empty((len(images), self.grid.patches, self.patch_width), dtype=np.float32)
        for image, out in zip(images, patches, strict=True):
            self._levels.fill(self._pixels(as_rgb(image)), out)
        return patches.reshape(-1, self.patch_width)

    def _pixels(self, image: Image) -> NDArray[np.uint8]:
        """uint8 [height, width, 3] of the grid's size, of an image in RGB."""
        process = self._processor
        cell = process.patch_size * process.merge_size
        own = natural_grid(image.height, image.width, cell, process.min_pixels, process.max_pixels, process.merge_size)
        if own == self.grid:
            return process.resized(image, self._size)
        return np.asarray(fitted(image, self._size, self._policy))


class FittingProcessor:
    """Makes patches of images at the grids that programs take: what `processor(fitter.fit(image))` returns.

    Grids of fixed programs go through `FixedGridProcessor` where the processor allows for it.

    Args:
        processor: The checkpoint's image processor.
        fitter: Chooses the grids; None to leave that to the processor.
    """

    def __init__(self, processor: ImageProcessor, fitter: Fitter | None) -> None:
        self._processor, self._fitter = processor, fitter
        self._fixed: dict[Grid, FixedGridProcessor] = {}
        if fitter is not None:
            try:
                self._fixed = {grid: FixedGridProcessor(processor, grid, fitter.policy) for grid in fitter.fixed}
            except ConfigurationError:  # the processor's own way takes longer and serves every processor
                self._fixed = {}

    def __call__(self, image: Image) -> tuple[NDArray[np.float32], Grid]:
        """Patches of one image, float32 [P, patch_width], and their grid.

        Raises:
            InputError: If it cannot be read, or the processor refuses it.
            UnfitGridError: If it is empty, or one side is more than 200 times the other.
        """
        image = as_rgb(image)
        if self._fitter is None:
            return self._processor(image)
        known = self._fixed.get(self._fitter.grid_for(image.height, image.width))
        return self._processor(self._fitter.fit(image)) if known is None else (known([image]), known.grid)


def fixed_grid_processor(
    source: Tower | Path | str, grid: GridLike, *, policy: FitPolicy = "letterbox", backend: ImageBackend = "pil"
) -> FixedGridProcessor:
    """What makes patches of one grid for a checkpoint.

    Args:
        source: The checkpoint's folder, or its tower.
        grid: One frame's, in patches.
        policy: How an image gets another aspect ratio.
        backend: Which of transformers' processors it equals.

    Raises:
        GridError: If the grid is not one frame's, or not divisible by the merge size.
        ConfigurationError: If a library is missing, or the processor cannot be used at that grid.
        CheckpointError: If the checkpoint has no image processor.
    """
    folder = source.checkpoint.folder if isinstance(source, Tower) else Path(source)
    return FixedGridProcessor(image_processor(folder, backend), grid, policy)
