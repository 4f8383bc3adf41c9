"""The canary: images with known answers that a device must encode correctly, at first and again from time to time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visionaccel.backends import DriftReport
from visionaccel.bundle import Golden
from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.comparison import THRESHOLDS, length_errors, token_cosines
from visionaccel.core.containment import device_errors, tell
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import Encoder
from visionaccel.errors import DeadlineError, UnfitGridError, VisionAccelError

_SAME = 0.9999
"""The lowest cosine between two answers of one encoder to one image: threads may add in a different order."""

_SIDE = 6
_MOST_EVIDENCE = 4

Encode: TypeAlias = Callable[[NDArray[np.float32], Sequence[Grid]], Array]
"""Computes embeddings of patches, like `Encoder.encode`."""


@dataclass(frozen=True, slots=True)
class CanaryResult:
    """The result of a canary.

    Attributes:
        lowest_cosine: The lowest cosine of a token; -1 if no image could be encoded.
        limit: The lowest cosine that passes.
        seconds: How long the canary took.
        failure: What is wrong, with the numbers; None if the canary passed.
        encoded: Whether at least one image could be encoded.
        wrong: Whether an answer was wrong. A failure without it means that an image could not be encoded.
    """

    lowest_cosine: float
    limit: float
    seconds: float
    failure: str | None
    encoded: bool
    wrong: bool


class FirstAnswer:
    """The first encoder's answer to a test picture, for a source without golden images.

    It is the reference for encoders that open later, when the files may no longer be those that were verified.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._image: Golden | None = None
        self._limit = 0.0

    def offer(self, image: Golden, encoder: Encoder) -> None:
        """Keep an encoder's answer if it is the first."""
        with self._lock:
            if self._image is None:
                self._image, self._limit = image, precision_limit(encoder)

    def image_for(self, encoder: Encoder) -> Golden | None:
        """The picture, its answer and the limit for this encoder; None if there is no answer or it does not fit."""
        image = self._image
        if image is None or not _takes(encoder, image):
            return None
        # Both answers may be as far from the exact one as their precision allows.
        angle = math.acos(self._limit) + math.acos(precision_limit(encoder))
        return replace(image, threshold=math.cos(angle))


class Canary:
    """Encodes golden images and compares the answers with the known ones. Used by one thread at a time.

    Without golden images (there is no bundle, or it was never validated), an encoder's first answer is compared with
    that of the first encoder, and its later answers with its first. This finds an encoder with other weights and a
    device whose results change over time, but not a first encoder that was wrong from the start.

    Args:
        images: The golden images; those that do not fit a program of the encoder are left out.
        first: The answer of the first encoder of this source.
        fallback: Whether the encoder runs on the weights, in a precision that the golden images' limits ignore.
    """

    def __init__(
        self, images: Sequence[Golden] = (), first: FirstAnswer | None = None, *, fallback: bool = False
    ) -> None:
        self._images, self._first, self._fallback = tuple(images), first or FirstAnswer(), fallback
        self._evidence: tuple[Golden, ...] = ()
        self._own: Golden | None = None
        self._lock = threading.Lock()

    def remember(self, image: Golden) -> None:
        """Include an image that the encoder got wrong from now on. The last few are kept."""
        with self._lock:
            self._evidence = (*self._evidence, image)[-_MOST_EVIDENCE:]

    def check(self, encoder: Encoder, encode: Encode, *, quick: bool) -> CanaryResult:
        """Encode the images and compare. Never raises for what the encoder does.

        Args:
            encoder: The encoder to check.
            encode: Encodes with that encoder, within a deadline.
            quick: Encode only each program's smallest image, and the images that the encoder got wrong before.
        """
        started = time.perf_counter()
        golden = self._fitting(encoder, quick)
        images = [(f"golden image {image.name}", image) for image in (*self._evidence, *golden)]
        if not golden:
            images.append(self._answered(encoder))
        lowest, limit = 1.0, min(image.threshold for _, image in images)
        failure, encoded, wrong, rows = None, False, False, None
        for what, image in images:
            rows = _encoded(encode, image)
            if isinstance(rows, VisionAccelError):
                failure = failure or f"{what} could not be encoded: {rows.message}"
                if isinstance(rows, DeadlineError):
                    break  # the other images would take as long
                continue
            expected = image.embeddings if len(image.embeddings) else rows
            cosine, reason = drift_of(rows, expected, image.threshold)
            encoded, wrong = True, wrong or reason is not None
            if cosine < lowest:
                lowest, limit = cosine, image.threshold
            if reason is not None:
                failure = failure or f"{what} was encoded incorrectly: {reason}"
        if not golden and failure is None and self._own is None and isinstance(rows, np.ndarray):
            self._own = replace(images[-1][1], embeddings=np.array(rows, np.float32), threshold=_SAME)
            self._first.offer(self._own, encoder)
        lowest = lowest if encoded else -1.0
        report_comparison(encoder, "canary", encoded, lowest, limit, failure is None, started)
        return CanaryResult(lowest, limit, time.perf_counter() - started, failure, encoded, wrong)

    def _answered(self, encoder: Encoder) -> tuple[str, Golden]:
        """The test picture that replaces golden images, and what to call it. It has no answer for the first encoder."""
        if self._own is not None:
            return "a test picture that it encoded before", self._own
        first = self._first.image_for(encoder)
        if first is not None:
            return "a test picture that the first encoder encoded at the start", first
        return "a test picture", _picture(encoder)

    def _fitting(self, encoder: Encoder, quick: bool) -> list[Golden]:
        """The golden images that fit this encoder, smallest first; only the smallest of each program if quick."""
        fitting: list[Golden] = []
        for image in sorted(self._images, key=lambda image: len(image.patches)):
            if _takes(encoder, image) and not (quick and image.program in {other.program for other in fitting}):
                limit = min(image.threshold, precision_limit(encoder)) if self._fallback else image.threshold
                fitting.append(replace(image, threshold=limit))
        return fitting


def report_comparison(
    encoder: Encoder,
    source: Literal["canary", "shadow"],
    encoded: bool,
    lowest_cosine: float,
    limit: float,
    passed: bool,
    started: float,
) -> None:
    """Report a comparison that began at `started`, on the clock of `time.perf_counter`, to observers."""
    seconds, device = time.perf_counter() - started, encoder.capabilities.device
    report = DriftReport(encoder.backend, device, source, encoded, lowest_cosine, limit, passed, seconds)
    tell(partial(encoder.hooks.visionaccel_compared, report=report))


def _takes(encoder: Encoder, image: Golden) -> bool:
    """Whether an encoder has a program for an image."""
    try:
        for grid in image.grids:
            encoder.program_for(grid)
    except UnfitGridError:
        return False
    return True


def precision_limit(encoder: Encoder) -> float:
    """The lowest cosine with the exact answer that an encoder's precision allows."""
    lowest = THRESHOLDS["bfloat16"]
    return min(
        THRESHOLDS.get(opened.program.quantization or opened.session.capabilities.precision, lowest)
        for opened in encoder.programs
    )


def _encoded(encode: Encode, image: Golden) -> NDArray[np.float32] | VisionAccelError:
    try:
        with device_errors("the encode"):
            return as_numpy(encode(image.patches, image.grids))
    except VisionAccelError as error:
        return error


def drift_of(found: NDArray[np.float32], reference: NDArray[np.float32], threshold: float) -> tuple[float, str | None]:
    """Compare embeddings [tokens, width] with the reference's.

    Lengths may differ by as much as the threshold's angle moves the end of an embedding, as for a certificate.

    Returns:
        The lowest cosine of a token, and why the embeddings do not pass; None if they do.
    """
    if found.shape != reference.shape:
        return -1.0, f"the embeddings have shape {list(found.shape)}, and the reference has {list(reference.shape)}."
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
    """A small test picture that fits a program, without an answer; the same in every process."""
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
