"""Trials of programs: encodes of generated patches, pictures and photographs at grids of a program's coverage.

White noise shows only faults that affect any row. Pictures have the properties of real images: similar neighbours, flat
areas, and rows that differ from columns.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.grid import Grid, total_patches
from visionaccel.core.program import AnyGrid, Bucket, Coverage, FixedGrid
from visionaccel.errors import BundleError, CheckpointError, ConfigurationError
from visionaccel.families import Tower
from visionaccel.images import MOST_ASPECT_RATIO, Fitter, ImageProcessor, load_image

if TYPE_CHECKING:
    from PIL.Image import Image

Patches = NDArray[np.float32]

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "page.png", "text.png", "rocket.jpg")
_PIXELS = 2**62
_SMALL, _LARGE, _LINE = (3, 5), (13, 22), 12
"""Sides of grids in tokens. Windows have a side of four tokens in the released models, so these have partial ones."""


@dataclass(frozen=True)
class Trial:
    """One encode. Equal trials have equal patches.

    Attributes:
        name: A short name of its content.
        grids: The grids of the call's images and videos.
        photograph: The image file, if it is a photograph.
        fitted: Whether the image was fitted to the grid, instead of having the grid that the processor gives it.
        patches: Returns float32 [P, patch_width].
    """

    name: str
    grids: tuple[Grid, ...]
    photograph: Path | None
    fitted: bool
    patches: Callable[[], Patches] = field(compare=False, repr=False)

    def where(self, token: int, merge_size: int) -> str:
        """Describe the place of a row of its embeddings."""
        number = 0
        while token >= (tokens := self.grids[number].tokens(merge_size)):
            token -= tokens
            number += 1
        grid = self.grids[number]
        width = grid.w // merge_size
        frame, within = divmod(token, grid.h // merge_size * width)
        item = f"image {number}, " if len(self.grids) > 1 else ""
        step = f"frame {frame}, " if grid.t > 1 else ""
        return f"{self}, {item}{step}row {within // width}, column {within % width} of its tokens"

    def __str__(self) -> str:
        return f"{self.name} at grid {', '.join(map(str, self.grids))}"


class Trials:
    """Makes trials for programs of a tower, from photographs too if the checkpoint has an image processor."""

    def __init__(self, tower: Tower, processor: ImageProcessor | None, photographs: Sequence[Path] = ()) -> None:
        self._tower, self._processor = tower, processor
        if photographs and processor is None:
            raise ConfigurationError(
                f"{tower.checkpoint.folder} has no image processor, so images cannot be used.",
                hint="Pass a complete checkpoint as the reference, or no images.",
            )
        self._photographs = {path: load_image(path).size for path in photographs}

    def of(self, coverage: Coverage) -> tuple[Trial, ...]:
        """Make the trials of a program: noise at each grid, and pictures and photographs spread over the grids."""
        calls = trial_calls(self._tower, coverage)
        if not calls:
            raise BundleError(f"no image fits a program for {coverage}.", hint="Export the bundle again.")
        found = [self._generated("noise", call, _noise) for call in calls]
        if self._processor is None:
            return (*found, *(self._generated("slope", call, _slope) for call in calls))
        for number in range(max(len(calls), len(_PICTURES))):
            found.append(self._picture(list(_PICTURES)[number % len(_PICTURES)], calls[number % len(calls)]))
        upright = calls[0][0]
        frames = [upright, _turned(upright)] if (_turned(upright),) in calls else [upright]
        found += map(partial(self._photograph, coverage), self._photographs, cycle(frames))
        return tuple(found)

    def _generated(
        self, name: str, grids: tuple[Grid, ...], make: Callable[[np.random.Generator, int, int], Patches]
    ) -> Trial:
        rows, width = total_patches(grids), self._tower.patch_width
        return Trial(name, grids, None, False, lambda: make(_generator(name, grids), rows, width))

    def _picture(self, name: str, grids: tuple[Grid, ...]) -> Trial:
        def patches() -> Patches:
            from PIL import Image as pillow

            rng, frames = _generator(name, grids), []
            for grid in grids:
                pixels = _PICTURES[name](rng, *self._pixels(grid))
                for t in range(grid.t):
                    image = pillow.fromarray(np.roll(pixels, 5 * t, axis=1))
                    frames.append(self._processed(image, grid.frame))
            return np.concatenate(frames)

        return Trial(name, grids, None, False, patches)

    def _photograph(self, coverage: Coverage, path: Path, grid: Grid) -> Trial:
        assert self._processor is not None
        taken = coverage if isinstance(coverage, AnyGrid) else FixedGrid(grid)
        fitter = Fitter(self._tower, (taken,), "letterbox", self._processor.min_pixels, self._processor.max_pixels)
        width, height = self._photographs[path]
        fitted = fitter.grid_for(height, width)

        def patches() -> Patches:
            return self._processed(fitter.fit(load_image(path)), fitted)

        # Only the file's name, because certificates are published and paths are private.
        return Trial(path.name, (fitted,), path, isinstance(taken, FixedGrid), patches)

    def _processed(self, image: Image, expected: Grid) -> Patches:
        """Make patches of an image; one of its grid's size is not resized, even outside the processor's bounds."""
        assert self._processor is not None
        resize = (image.height, image.width) != self._pixels(expected)
        patches, grid = self._processor(image, resize=resize)
        if grid != expected or patches.shape[1] != self._tower.patch_width:
            raise CheckpointError(
                f"the image processor of {self._tower.checkpoint.folder} makes patches {list(patches.shape)} of grid "
                f"{grid}, but its vision tower expects patches of width {self._tower.patch_width} and grid {expected}.",
                hint="Use the processor configuration of this model.",
            )
        return patches

    def _pixels(self, grid: Grid) -> tuple[int, int]:
        return grid.h * self._tower.patch_size, grid.w * self._tower.patch_size


def trial_calls(tower: Tower, coverage: Coverage) -> tuple[tuple[Grid, ...], ...]:
    """Return the grids of the calls that a program is tried with; the first call is one image of a usual shape.

    For a program with baked tables, that is its grid. For a bucket: the fullest grids, the longest line of tokens, a
    small grid with partial windows, each in both orientations, and a single token. For a program for any grid: partial
    windows in both orientations, a large grid, a line, a single token, several images in a call, and a video.
    """

    def tokens(rows: int, columns: int) -> Grid:
        return Grid(1, rows * tower.merge_size, columns * tower.merge_size)

    match coverage:
        case FixedGrid(grid=grid):
            return ((grid,),)
        case Bucket():
            fullest = Fitter(tower, (coverage,), "stretch", 1, _PIXELS).largest
            longest = min(MOST_ASPECT_RATIO, coverage.patches // tower.merge_size**2)
            line = next((n for n in range(longest, 0, -1) if tower.fits(coverage, tokens(1, n))), 1)
            grids = [fullest, tokens(1, line), tokens(*_SMALL), tokens(1, 1)]
            calls: list[tuple[Grid, ...]] = [(each,) for grid in grids for each in (grid, _turned(grid))]
        case AnyGrid():
            some, video = tokens(5, 9), tokens(6, 5)
            singles = [some, _turned(some), tokens(*_LARGE), tokens(1, _LINE), tokens(1, 1)]
            calls = [(each,) for each in singles]
            calls += [(some, some, tokens(3, 2)), (Grid(2, video.h, video.w),)]
    fitting = [call for call in calls if all(tower.fits(coverage, grid.frame) for grid in call)]
    return tuple(dict.fromkeys(fitting))


def find_images(places: Sequence[Path]) -> tuple[Path, ...]:
    """Return the given files, and the image files in the given folders sorted by name."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(file for file in place.iterdir() if file.suffix.lower() in _SUFFIXES)
        else:
            found.append(place)
    if places and not found:
        raise ConfigurationError(
            f"no images were found in {', '.join(map(str, places))}.",
            hint=f"Pass folders that contain files of these types: {', '.join(sorted(_SUFFIXES))}.",
        )
    return tuple(dict.fromkeys(found))


def bundled_photographs() -> tuple[Path, ...]:
    """Return the photographs and scans of scikit-image if it is installed, without downloads or imports."""
    spec = find_spec("skimage")
    folders = [Path(place, "data") for place in (spec.submodule_search_locations or ())] if spec else []
    return tuple(file for folder in folders for file in (folder / name for name in _PHOTOGRAPHS) if file.is_file())


def _turned(grid: Grid) -> Grid:
    return Grid(grid.t, grid.w, grid.h)


def _generator(name: str, grids: tuple[Grid, ...]) -> np.random.Generator:
    """Return a generator with the same numbers for the same arguments in every process, unlike `hash`."""
    return np.random.default_rng(zlib.crc32(f"{name} {grids}".encode()))


def _noise(rng: np.random.Generator, rows: int, width: int) -> Patches:
    return rng.standard_normal((rows, width), dtype=np.float32)


def _slope(rng: np.random.Generator, rows: int, width: int) -> Patches:
    """Make patches that change slowly from one to another, so that neighbours are similar."""
    first, last = rng.standard_normal((2, width), dtype=np.float32)
    angles = np.linspace(0, np.pi, rows, dtype=np.float32)[:, None]
    patches: Patches = np.cos(angles) * first + np.sin(angles) * last
    return patches


def _gradient(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Draw red growing to the right, green downwards and blue along the diagonal, from a random level."""
    down, right = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None, :]
    channels = np.stack(np.broadcast_arrays(right, down, (down + right) / 2), axis=-1)
    level = rng.uniform(0, 0.3, 3)
    pixels: NDArray[np.uint8] = (255 * (level + (1 - level) * channels)).astype(np.uint8)
    return pixels


def _checkerboard(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Draw alternating light and dark cells of different colours, in a size that no patch has."""
    rows, columns = -(-height // 9), -(-width // 17)
    dark = np.indices((rows, columns)).sum(axis=0)[..., None] % 2 == 0
    colours = np.where(dark, 0, 128) + rng.integers(0, 128, (rows, columns, 3))
    return colours.astype(np.uint8).repeat(9, axis=0).repeat(17, axis=1)[:height, :width]


def _strokes(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Draw dark strokes on a light page, which look like words."""
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (width, height), (244, 240, 230))
    pen = ImageDraw.Draw(page)
    size = int(np.clip(height // 6, 7, 24))
    for top in range(2, height, size + size // 2):
        left = 2
        while left < width:
            if rng.uniform() < 0.85:
                corners = rng.uniform(0, 1, (4, 2)) * (0.6 * size, size) + (left, top)
                shade = int(rng.integers(0, 90))
                pen.line([(float(x), float(y)) for x, y in corners], (shade, shade, shade), max(1, size // 8))
            left += size * 3 // 4
    return np.asarray(page)


_PICTURES: dict[str, Callable[[np.random.Generator, int, int], NDArray[np.uint8]]] = {
    "strokes": _strokes,
    "gradient": _gradient,
    "checkerboard": _checkerboard,
}
