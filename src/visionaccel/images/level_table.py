"""What an image processor makes of grey levels, read off its own answers, and patches made with it in one pass.

After resizing, a processor of the Qwen-VL kind treats each pixel alone: it rescales and normalises a level of a
channel, and puts it in a patch. So 256 values a channel say all about it, and a table of them is exact where a formula
of one's own would round differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.errors import ConfigurationError

__all__ = ["LevelTable", "read_levels"]

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
