"""The shadow: the reference computes a share of the device's answers again, in the background."""

from __future__ import annotations

import random
import threading
import time
from functools import partial

import numpy as np
from numpy.typing import NDArray

from visionaccel.bundle import Golden
from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.grid import Grid
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import VisionAccelError
from visionaccel.trust.canary import drift_of, report_comparison
from visionaccel.trust.link import ChainLink
from visionaccel.trust.threads import InOrder

logger = safe_logger(__name__)

_MOST_WAITING = 2
"""The maximum number of answers that wait; each is a copy of an item's patches and embeddings."""


class Shadow:
    """Compares answers with the reference's. No request waits for it: answers that it has no time for are skipped.

    An answer beyond the limit disables the link, and the link's other answers are dropped.

    Args:
        share: The share of items to compare, from 0 to 1.
        limit: The lowest cosine of a token that passes.
        reference: The reference's link; opened when first needed, and closed with the shadow.

    Attributes:
        compared: Answers compared so far.
        skipped: Answers that it had no time to compare.
        drifted: Answers beyond the limit.
    """

    def __init__(self, share: float, limit: float, reference: ChainLink) -> None:
        self._share, self._limit, self._reference = share, limit, reference
        self._comparisons = InOrder("visionaccel-shadow")
        self._lock = threading.Lock()
        self._closed = False
        self.compared = self.skipped = self.drifted = 0

    def offer(self, link: ChainLink, patches: Array, grid: Grid, rows: Array) -> None:
        """Compare a random share of answers. Copies patches [P, patch_width] and rows [tokens, out_width] to do so."""
        if self._closed or random.random() >= self._share:  # noqa: S311 - the choice need not be secret
            return
        with self._lock:
            if self._closed or len(self._comparisons) >= _MOST_WAITING:
                self.skipped += 1
            else:
                self._comparisons.add(partial(self._compare, link, _copied(patches), grid, _copied(rows)))

    def close(self) -> None:
        """Compare no more answers, and close the reference."""
        with self._lock:
            self._closed = True
            self._comparisons.clear()
        self._reference.close(0.0)

    def _compare(self, link: ChainLink, patches: NDArray[np.float32], grid: Grid, rows: NDArray[np.float32]) -> None:
        started = time.perf_counter()
        answer = self._reference.encode(patches, [grid], purpose="shadow")
        if isinstance(answer, VisionAccelError):
            if not self._closed:
                logger.error("The reference could not encode an image for comparison: %s", answer)
            return
        expected = as_numpy(answer)
        cosine, failure = drift_of(rows, expected, self._limit)
        if link.encoder_if_open is not None:
            report_comparison(link.encoder_if_open, "shadow", True, cosine, self._limit, failure is None, started)
        if failure is not None and not self._closed:
            self.drifted += 1
            name = f"an image of grid {grid} that a client sent"
            evidence = Golden(name, "", (grid,), patches, np.array(expected, np.float32), self._limit)
            link.distrust(f"the reference does not agree on {name}: {failure}", evidence)
        self.compared += 1  # last: then everything that follows from the comparison has happened


def _copied(array: Array) -> NDArray[np.float32]:
    return np.array(as_numpy(array), dtype=np.float32)
