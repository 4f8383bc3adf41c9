"""The canary: images with known answers that a device must encode correctly, at first and again from time to time."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from visionaccel.backends import DriftReport
from visionaccel.bundle import Golden
from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.comparison import THRESHOLDS, Comparison
from visionaccel.core.containment import device_errors, tell
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import DeadlineError, DeviceError, UnfitGridError, VisionAccelError
from visionaccel.trust.threads import background

if TYPE_CHECKING:
    from visionaccel.trust.link import ChainLink

logger = safe_logger(__name__)

_T = TypeVar("_T")

_SAME = 0.9999
"""The lowest cosine between two answers of one encoder to one image: threads may add in a different order."""

_SIDE = 6
_MOST_EVIDENCE = 4
_PROBING = 0.05

Encode: TypeAlias = Callable[[NDArray[np.float32], Sequence[Grid]], Array]
"""Computes embeddings of patches, like `Encoder.encode`."""


@dataclass(frozen=True, slots=True)
class CanaryResult:
    """The result of a canary.

    Attributes:
        report: What observers receive: whether an image could be encoded, the lowest cosine, and its limit.
        failure: What is wrong, with the numbers; None if the canary passed.
        wrong: Whether an answer was wrong. A failure without it means that an image could not be encoded.
    """

    report: DriftReport
    failure: str | None
    wrong: bool


class FirstAnswer:
    """The first encoder's answer to a test picture, with that encoder's threshold; for a source without golden images.

    It is the reference for encoders that open later, when the files may no longer be those that were verified.
    """

    image: Golden | None = None


class Canary:
    """Encodes golden images and compares the answers with the known ones. Used by one thread at a time.

    Without golden images (for a checkpoint, or a bundle that was never validated), an encoder's first answer is
    compared with that of the first encoder, and its later answers with its first. This finds an encoder with different
    weights and a device whose results change over time, but not a first encoder that was wrong from the start.

    Args:
        images: The golden images; those that do not fit a program of the encoder are left out.
        first: The answer of the first encoder of this source.
        fallback: Whether the encoder runs on the weights, in a precision that the golden images' limits ignore.
    """

    def __init__(
        self, images: Sequence[Golden] = (), first: FirstAnswer | None = None, *, fallback: bool = False
    ) -> None:
        self._images = [replace(image, name=f"golden image {image.name}") for image in images]
        self._first, self._fallback = first or FirstAnswer(), fallback
        self._evidence: tuple[Golden, ...] = ()
        self._own: Golden | None = None
        self._lock = threading.Lock()

    def remember(self, image: Golden) -> None:
        """Include an image that the encoder got wrong from now on. The last few are kept."""
        with self._lock:
            self._evidence = (*self._evidence, image)[-_MOST_EVIDENCE:]

    def check(self, encoder: Encoder, encode: Encode, *, quick: bool) -> CanaryResult:
        """Encode the images, compare, and report that to observers. Never raises for what the encoder does.

        Args:
            encoder: The encoder to check.
            encode: Encodes with that encoder, within a deadline.
            quick: Encode only each program's smallest image, and the images that the encoder got wrong before.
        """
        started = time.perf_counter()
        golden = self._fitting(encoder, quick)
        images = [*self._evidence, *(golden or [self._own or self._answered_by_first(encoder)])]
        lowest, limit = 1.0, min(image.threshold for image in images)
        failure, encoded, wrong, rows = None, False, False, None
        for image in images:
            rows = _encoded(encode, image)
            if isinstance(rows, VisionAccelError):
                failure = failure or f"{image.name} could not be encoded: {rows.message}"
                if isinstance(rows, DeadlineError):
                    break  # the other images would take as long
                continue
            exact = image.embeddings if len(image.embeddings) else rows
            cosine, reason = drift_of(rows, exact, image.threshold, encoder.tower.spec.out)
            encoded, wrong = True, wrong or reason is not None
            if cosine < lowest:
                lowest, limit = cosine, image.threshold
            if reason is not None:
                failure = failure or f"{image.name} was encoded incorrectly: {reason}"
        if not (golden or failure or self._own) and isinstance(rows, np.ndarray):
            answer = replace(images[-1], embeddings=np.array(rows, np.float32))
            self._own = replace(answer, name="a test picture that it encoded before", threshold=_SAME)
            self._first.image = self._first.image or replace(answer, threshold=precision_limit(encoder))
        report = report_comparison(encoder, "canary", started, lowest if encoded else None, limit, failure)
        return CanaryResult(report, failure, wrong)

    def _answered_by_first(self, encoder: Encoder) -> Golden:
        """Return the test picture that replaces golden images; it has no answer for the first encoder."""
        first = self._first.image
        if first is None or not _takes(encoder, first):
            return _picture(encoder)
        # Both answers may be as far from the exact one as their precision allows.
        limit = math.cos(math.acos(first.threshold) + math.acos(precision_limit(encoder)))
        return replace(first, name="a test picture that the first encoder encoded at the start", threshold=limit)

    def _fitting(self, encoder: Encoder, quick: bool) -> list[Golden]:
        """Return the golden images that fit this encoder, smallest first; if quick, only each program's smallest."""
        fitting: list[Golden] = []
        for image in sorted(self._images, key=lambda image: len(image.patches)):
            if _takes(encoder, image) and not (quick and image.program in {other.program for other in fitting}):
                limit = min(image.threshold, precision_limit(encoder)) if self._fallback else image.threshold
                fitting.append(replace(image, threshold=limit))
        return fitting


class Keeper:
    """Runs one link's canary: before its first encode, after a restart, on a timer, and as a probe while disabled.

    If not `on`, the canary runs only as a probe. An interval of 0 means no timer.
    """

    def __init__(self, link: ChainLink, canary: Canary, *, on: bool, interval: float) -> None:
        self._link, self._canary, self._on = link, canary, on
        self._interval = interval if on and interval else math.inf
        self._checking, self._lock = threading.RLock(), threading.Lock()
        self._passed_restarts: int | None = None
        self._checked_at = 0.0
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def unverified(self) -> bool:
        """Whether the canary must pass before the next encode, as it has not since the device's process started."""
        return self._on and self._link.restarts != self._passed_restarts

    def run_verified(self, encoder: Encoder, attempt: Callable[[], _T]) -> _T:
        """Run an attempt on a device that has passed a canary since it, or its process, started; return its result.

        Raises:
            VisionAccelError: The attempt's error, or why the device cannot be used.
        """
        while True:
            if self.unverified:
                with self._checking:  # one caller runs it while the others wait
                    failure = self.check(encoder).failure if self.unverified else None
                if failure is not None:
                    raise DeviceError(f"{self._link.name} failed its canary: {failure}")
            verified, answer = self._passed_restarts, attempt()
            if not self._on or self._link.restarts == verified:
                return answer  # otherwise it may come from a process that no canary has checked

    def check(self, encoder: Encoder) -> CanaryResult:
        """Run the canary now, and disable the link if it answers wrong. Only the first run takes all golden images."""
        link = self._link
        with self._checking:
            restarts, first = link.restarts, self._passed_restarts is None
            limit = link.open_deadline if first else link.deadline

            def encode(patches: Array, grids: Sequence[Grid]) -> Array:
                return link.call(partial(encoder.encode, patches, grids, purpose="canary"), limit * len(grids))

            result = self._canary.check(encoder, encode, quick=not first)
            if result.failure is None:
                self._passed_restarts = restarts
        if first:
            self.wake()
        if result.wrong and not self._closed:
            link.distrust(f"its canary failed: {result.failure}")
        return result

    def wake(self) -> None:
        """Start looking after the link: it was disabled, or its first canary has run."""
        with self._lock:
            if not self._closed:
                self._checked_at = time.monotonic()
                background.start(self._tick)

    def close(self, wait: float) -> None:
        """Stop running canaries, and wait for one in progress."""
        with self._lock:
            self._closed, thread = True, self._thread
        background.stop(self._tick)
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait)

    def _tick(self) -> float:
        """Start a canary or probe that is due, on its own thread; return the seconds until the next look."""
        breaker = self._link.breaker
        with self._lock:
            if self._closed or (self._thread is not None and self._thread.is_alive()):
                return _PROBING
            left = 0.0
            if breaker.closed:
                left = self._checked_at + self._interval - time.monotonic()
            if breaker.probe_due or (breaker.closed and left <= 0 and not self._link.cut):
                thread = threading.Thread(target=self._run, name="visionaccel-canary", daemon=True)
                thread.start()
                self._thread = thread
            return max(left, _PROBING)

    def _run(self) -> None:
        breaker = self._link.breaker
        probing = breaker.begin_probe()
        if not (probing or breaker.closed):
            return
        failure: str | None
        try:
            failure = self.check(self._link.open()).failure
        except VisionAccelError as error:
            failure = error.message  # it cannot be opened, for which the link has disabled itself again
        except Exception as error:  # A probe that has begun must end.
            logger.exception("Unexpected error in a canary.")
            failure = f"the probe failed with {type(error).__name__}: {error}"
        if probing:
            breaker.end_probe(failure)
        elif failure is not None:
            breaker.failed(f"its canary failed: {failure}")
        self._checked_at = time.monotonic()


def report_comparison(
    encoder: Encoder,
    source: Literal["canary", "shadow"],
    started: float,
    cosine: float | None,
    limit: float,
    failure: str | None,
) -> DriftReport:
    """Report a comparison to observers. The cosine is the lowest of a token; None if no image could be encoded."""
    device, seconds = encoder.capabilities.device, time.perf_counter() - started
    encoded, lowest = cosine is not None, -1.0 if cosine is None else cosine
    report = DriftReport(encoder.backend, device, source, encoded, lowest, limit, failure is None, seconds)
    tell(partial(encoder.hooks.visionaccel_compared, report=report))
    return report


def _takes(encoder: Encoder, image: Golden) -> bool:
    """Return whether an encoder has a program for an image."""
    try:
        for grid in image.grids:
            encoder.program_for(grid)
    except UnfitGridError:
        return False
    return True


def precision_limit(encoder: Encoder) -> float:
    """Return the lowest cosine with the exact answer that an encoder's precision allows."""
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


def drift_of(
    found: NDArray[np.float32], reference: NDArray[np.float32], threshold: float, width: int
) -> tuple[float, str | None]:
    """Compare embeddings with the reference's, and each deepstack level by itself.

    Lengths may differ by as much as the threshold's angle moves the end of an embedding, as for a certificate.

    Args:
        found: [tokens, out_width].
        reference: The same from the reference.
        threshold: The lowest cosine that passes.
        width: Width of an embedding, and of each deepstack level next to it.

    Returns:
        The lowest cosine of a token or level, and why the embeddings do not pass; None if they do.
    """
    if found.shape != reference.shape:
        return -1.0, f"the embeddings have shape {list(found.shape)}, but the reference has {list(reference.shape)}."
    comparison = Comparison(width)
    comparison.add(found, reference)
    lowest, (longest, place) = comparison.lowest, comparison.worst_length
    if lowest < threshold:
        low, at = comparison.tokens_below(threshold), comparison.lowest_at
        return lowest, (
            f"lowest cosine {lowest:.6f} is under {threshold:g}, at token {at}, as are {low} of {len(found)} tokens."
        )
    allowed = math.sqrt(2 * (1 - threshold))
    if longest > allowed:
        return lowest, (
            f"the length of token {place} is off by {longest:.2%}; the limit is {allowed:.2%} (cosine {lowest:.6f})."
        )
    return lowest, None


def _picture(encoder: Encoder) -> Golden:
    """Return a small test picture that fits a program, without an answer; the same in every process."""
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
    return Golden("a test picture", "", (grid,), patches, np.empty((0, tower.out_width), np.float32), _SAME)
