"""The canary: images with known answers that a device must encode rightly before it is trusted, and again later."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from visionaccel.arrays import Array, as_numpy
from visionaccel.bundle.golden import Golden
from visionaccel.comparison import length_errors, token_cosines
from visionaccel.encoder import Encoder
from visionaccel.errors import UnfitGridError, VisionAccelError
from visionaccel.grid import Grid
from visionaccel.program import FixedGrid

__all__ = ["Canary", "CanaryResult", "drift_of"]

_SAME = 0.9999
"""The lowest cosine at which an encoder repeats its own answer: threads add in another order, and no more."""

_SIDE = 6
_MOST_EVIDENCE = 4

Encode: TypeAlias = Callable[[NDArray[np.float32], Sequence[Grid]], Array]
"""Embeddings of patches, as `Encoder.encode`."""


@dataclass(frozen=True, slots=True)
class CanaryResult:
    """What a canary found.

    Attributes:
        images: Encodes compared.
        lowest_cosine: The lowest cosine of a token; -1 if an encode failed.
        limit: The lowest that passes.
        seconds: How long it took.
        failure: What is wrong, with the numbers; None if nothing is.
        encoded: Something could be encoded; otherwise the cosine means nothing.
        wrong: It encoded, and answered wrongly; otherwise what failed could not be encoded at all.
    """

    images: int
    lowest_cosine: float
    limit: float
    seconds: float
    failure: str | None
    encoded: bool = True
    wrong: bool = False

    @property
    def passed(self) -> bool:
        """Whether the encoder may be trusted."""
        return self.failure is None


class Canary:
    """Encodes golden images and compares. May be asked from several threads.

    An encoder without golden images (it has no bundle, or one that was never validated) is held to its own first
    answer instead: that finds a device that changes its mind, and not one that was wrong from the start.

    Args:
        images: The golden images; those that no program of the encoder takes are left out.
    """

    def __init__(self, images: Sequence[Golden] = ()) -> None:
        self._images = tuple(images)
        self._evidence: tuple[Golden, ...] = ()
        self._own: Golden | None = None
        self._lock = threading.Lock()

    def remember(self, image: Golden) -> None:
        """Try this image, too, from now on: the encoder got it wrong. The last few are kept."""
        with self._lock:
            self._evidence = (*self._evidence, image)[-_MOST_EVIDENCE:]

    def check(self, encoder: Encoder, encode: Encode | None = None, *, quick: bool = False) -> CanaryResult:
        """Encode and compare. Never raises for what the encoder does.

        Args:
            encoder: What to try.
            encode: How to encode with it, if not by its own method, such as with a deadline.
            quick: Encode only the smallest image of each program, as on a timer, and what it got wrong before.
        """
        started = time.perf_counter()
        encode = encode or partial(encoder.encode, purpose="canary")
        images = self._fitting(encoder, quick)
        if not images:
            return self._repeat(encoder, encode, started)
        lowest, limit = 1.0, min(image.threshold for image in images)
        failure, encoded, wrong = None, False, False
        for image in images:
            rows = _encoded(encode, image)
            if isinstance(rows, str):
                failure = failure or f"golden image {image.name} could not be encoded: {rows}"
                continue
            cosine, reason = drift_of(rows, image.embeddings, image.threshold)
            encoded, wrong = True, wrong or reason is not None
            if cosine < lowest:
                lowest, limit = cosine, image.threshold
            if reason is not None:
                failure = failure or f"golden image {image.name}: {reason}"
        seconds = time.perf_counter() - started
        return CanaryResult(len(images), lowest if encoded else -1.0, limit, seconds, failure, encoded, wrong)

    def _fitting(self, encoder: Encoder, quick: bool) -> list[Golden]:
        """The images that this encoder takes, at the start the smallest first; only that of each program if quick."""
        fitting = list(self._evidence)
        for image in sorted(self._images, key=lambda image: len(image.patches)):
            try:
                for grid in image.grids:
                    encoder.program_for(grid)
            except UnfitGridError:
                continue
            if not quick or image.program not in {other.program for other in fitting[len(self._evidence) :]}:
                fitting.append(image)
        return fitting

    def _repeat(self, encoder: Encoder, encode: Encode, started: float) -> CanaryResult:
        """Hold the encoder to what it answered first."""
        with self._lock:
            first = self._own is None
            image = self._own or _picture(encoder)
            rows = _encoded(encode, image)
            seconds = time.perf_counter() - started
            if isinstance(rows, str):
                refused = f"a picture of grid {image.grids[0]} could not be encoded: {rows}"
                return CanaryResult(1, -1.0, _SAME, seconds, refused, encoded=False)
            if first:
                self._own = Golden(image.name, "", image.grids, image.patches, np.array(rows, np.float32), _SAME)
            cosine, reason = drift_of(rows, rows if first else image.embeddings, _SAME)
        failure = None if reason is None else f"a picture that was encoded before comes out differently: {reason}"
        return CanaryResult(1, cosine, _SAME, seconds, failure, wrong=failure is not None)


def _encoded(encode: Encode, image: Golden) -> NDArray[np.float32] | str:
    """The embeddings of an image, or why there are none."""
    try:
        return as_numpy(encode(image.patches, image.grids))
    except VisionAccelError as error:
        return error.message
    except Exception as error:  # Whatever a vendor's stack raises, it is a canary that failed.
        return f"{type(error).__name__}: {error}"


def drift_of(found: NDArray[np.float32], reference: NDArray[np.float32], threshold: float) -> tuple[float, str | None]:
    """How far embeddings are from the reference's, and what is wrong with that.

    Args:
        found: [tokens, width].
        reference: [tokens, width].
        threshold: The lowest cosine of a token that passes. Lengths may differ by as much as that angle moves the end
            of an embedding, as for a certificate.

    Returns:
        The lowest cosine, and the reason if it, or a length, does not pass.
    """
    if found.shape != reference.shape:
        return -1.0, f"it has embeddings {list(found.shape)}, and the reference {list(reference.shape)}."
    cosines = token_cosines(found, reference)
    lowest = float(cosines.min())
    if lowest < threshold:
        low = int((cosines < threshold).sum())
        return lowest, f"lowest cosine {lowest:.6f} is under {threshold:g}; so are {low} of {len(cosines)} tokens."
    longest, allowed = float(length_errors(found, reference).max()), math.sqrt(2 * (1 - threshold))
    if longest > allowed:
        return lowest, f"an embedding's length is off by {longest:.2%}, over {allowed:.2%} (cosine {lowest:.6f})."
    return lowest, None


def _picture(encoder: Encoder) -> Golden:
    """A small picture that some program takes, without an answer: the same in every process."""
    tower = encoder.tower
    side = _SIDE * tower.merge_size
    grid = Grid(1, side, side)
    try:
        encoder.program_for(grid)
    except UnfitGridError:
        coverage = encoder.programs[0].program.coverage
        grid = coverage.grid if isinstance(coverage, FixedGrid) else Grid(1, tower.merge_size, tower.merge_size)
    rng = np.random.default_rng(1)
    first, last = rng.standard_normal((2, tower.patch_width), dtype=np.float32)
    angles = np.linspace(0, np.pi, grid.patches, dtype=np.float32)[:, None]
    patches = np.cos(angles) * first + np.sin(angles) * last
    return Golden("a slope", "", (grid,), patches, np.empty((0, tower.out_width), np.float32), _SAME)
