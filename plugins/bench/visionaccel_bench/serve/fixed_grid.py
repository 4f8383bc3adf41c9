"""Images to patches of one known grid: resized by the processor's own library, then normalised and cut in one pass.

The Hugging Face processor makes a copy of the image for each of its steps, two of them in float64. After resizing it
treats each pixel alone: it rescales and normalises a level of a channel, and puts it in a patch. So 256 values of each
channel say all about it, and a table of them, read off its own answers, gives its patches bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import as_numpy
from visionaccel.core.grid import GridLike, as_grids
from visionaccel.errors import ConfigurationError, GridError, InputError
from visionaccel.families import Tower
from visionaccel.images import (
    FitPolicy,
    ImageBackend,
    ImageProcessor,
    as_rgb,
    check_policy,
    fitted,
    image_processor,
    natural_grid,
    require_area,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_BICUBIC = 3
"""Pillow's number of the filter."""


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
        self._processor, self._levels, self._policy = processor, levels_of(processor), policy
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
            return resized(process, image, self._size)
        return np.asarray(fitted(image, self._size, self._policy))


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


def levels_of(processor: ImageProcessor) -> LevelTable:
    """What a processor makes of grey levels.

    Raises:
        ConfigurationError: If it does more than to resize with the bicubic filter, normalise and make patches.
    """
    if processor.filter != _BICUBIC:
        raise ConfigurationError(
            "the image processor does not resize with the bicubic filter.",
            hint="Use visionaccel.images.image_processor, which runs it as it is.",
        )
    from PIL import Image as pillow

    def process(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return processor(pillow.fromarray(pixels), resize=False)[0]

    return read_levels(process, processor.patch_size, processor.merge_size)


def resized(processor: ImageProcessor, image: Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """An image as a processor resizes it: bicubic and antialiased, by the library that it computes on.

    Args:
        processor: The processor.
        image: In RGB.
        size: Width and height to come to.

    Returns:
        uint8 [height, width, 3]; perhaps read-only.
    """
    from PIL.Image import Resampling

    if processor.backend == "pil" or image.size == size:
        return np.asarray(image if image.size == size else image.resize(size, Resampling.BICUBIC))
    import torch

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(pixels, size[::-1], mode="bicubic", antialias=True)
    return np.asarray(as_numpy(scaled[0].permute(1, 2, 0)))


CHANNELS, LEVELS = 3, 256
_PROBED = 1024
"""Pixels of the probe: each level stands in several places, so that an order other than the expected one shows."""


@dataclass(frozen=True, eq=False)
class LevelTable:
    """The values that grey levels get in patches.

    Attributes:
        values: float32 [3, 256], by channel and level.
        patch_size: Side of a patch in pixels.
        merge_size: Patches along a side of a merged token; the patches of a token follow each other.
        frames: Times that a still image is repeated in a patch: the temporal patch size.
    """

    values: NDArray[np.float32]
    patch_size: int
    merge_size: int
    frames: int

    @property
    def patch_width(self) -> int:
        """Values of a patch: channels, frames, rows and columns, in this order."""
        return CHANNELS * self.frames * self.patch_size**2

    def fill(self, pixels: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Write the patches of one image.

        Args:
            pixels: uint8 [height, width, 3]; sides are multiples of a merged token's.
            out: float32 [P, patch_width], C-contiguous; every value is written.
        """
        height, width, _ = pixels.shape
        side, merge = self.patch_size, self.merge_size
        rows, columns = height // (side * merge), width // (side * merge)
        bands = pixels.reshape(rows, merge, side, columns, merge, side, CHANNELS)
        targets = out.reshape(rows, columns * merge**2, CHANNELS, self.frames, side**2)
        # One row of tokens at a time, so that what lies between pixels and patches stays in the processor's cache.
        for band, target in zip(bands, targets, strict=True):
            planes = band.transpose(5, 2, 0, 3, 1, 4).reshape(CHANNELS, columns * merge**2, side**2)
            for channel, plane in enumerate(planes):
                # No level is out of bounds, and `clip` is the mode in which numpy does not look for one beforehand.
                target[:, channel] = np.take(self.values[channel], plane, mode="clip")[:, None]


def read_levels(process: Callable[[NDArray[np.uint8]], NDArray[Any]], patch_size: int, merge_size: int) -> LevelTable:
    """The table of a processor, from its patches of a picture with every level of every channel and of a darker one.

    Args:
        process: From pixels uint8 [height, width, 3], as they are, to patches float32 [P, patch_width].
        patch_size: Side of a patch in pixels.
        merge_size: Patches along a side of a merged token.

    Raises:
        ConfigurationError: If the patches are not what a table makes: another order, another width, values that depend
            on more than level and channel.
    """
    cell = patch_size * merge_size
    height, width = 2 * cell, max(3, -(-_PROBED // (2 * cell**2))) * cell
    rng = np.random.default_rng(0)
    levels = np.resize(np.arange(LEVELS, dtype=np.uint8), height * width)
    pixels = np.stack([rng.permutation(levels) for _ in range(CHANNELS)], axis=-1).reshape(height, width, CHANNELS)
    given = np.asarray(process(pixels))
    patches, plane = height * width // patch_size**2, CHANNELS * patch_size**2
    fitting = given.dtype == np.float32 and given.ndim == 2 and len(given) == patches
    if fitting and given.shape[1] and given.shape[1] % plane == 0:
        frames = given.shape[1] // plane
        identity = np.tile(np.arange(LEVELS, dtype=np.float32), (CHANNELS, 1))
        places = np.empty_like(given)
        LevelTable(identity, patch_size, merge_size, frames).fill(pixels, places)
        by_channel = (patches, CHANNELS, frames * patch_size**2)
        values = np.zeros((CHANNELS, LEVELS), dtype=np.float32)
        for channel in range(CHANNELS):
            places_here = places.reshape(by_channel)[:, channel].astype(np.uint8)
            values[channel, places_here] = given.reshape(by_channel)[:, channel]
        table, again = LevelTable(values, patch_size, merge_size, frames), np.empty_like(given)
        table.fill(pixels, again)
        if np.array_equal(again, given):
            # What depends on the picture as a whole shows on one of other levels.
            darker = pixels // 2
            table.fill(darker, again)
            if np.array_equal(again, np.asarray(process(darker))):
                return table
    raise ConfigurationError(
        "the image processor does more to pixels than to normalise them and put them in patches "
        f"(its answer to a picture of {width}x{height} pixels is {given.dtype} {list(given.shape)}).",
        hint="Use visionaccel.images.image_processor, which runs it as it is.",
    )
