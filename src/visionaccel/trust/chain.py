"""The chain of encoders, and the shadow that compares a share of its answers with the reference's.

No image is lost while a healthy encoder remains, and an image fails alone: it does not fail the others of its call.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from visionaccel.bundle import Golden
from visionaccel.core.arrays import Array, as_numpy, split_rows
from visionaccel.core.contracts import check_patches
from visionaccel.core.grid import Grid, GridLike, as_grids, total_patches
from visionaccel.core.safe_text import safe_logger
from visionaccel.encoder import Encoder
from visionaccel.errors import (
    DeadlineError,
    DeviceError,
    DeviceLostError,
    InputError,
    OutputError,
    UnfitGridError,
    VisionAccelError,
)
from visionaccel.trust.canary import drift_of, report_comparison
from visionaccel.trust.link import RETRY, ChainLink, no_time, worth_a_retry
from visionaccel.trust.threads import InOrder, background

logger = safe_logger(__name__)


_MOST_WAITING = 2
"""The maximum number of answers that wait; each is a copy of an item's patches and embeddings."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """One item's embeddings: `rows`, float32 [tokens, out_width], numpy or torch, which belong to the caller.

    A fallback's embeddings are computed in other arithmetic than the chosen encoder's.
    """

    rows: Array
    fallback: bool = False


class Shadow:
    """Compares answers with the reference's. No request waits for it: answers that it has no time for are skipped.

    An answer beyond the limit disables the link, and the link's other answers are dropped.

    Args:
        share: The share of items to compare, from 0 to 1.
        limit: The lowest cosine of a token that passes.
        reference: The reference's link; opened when first needed, and closed with the shadow.

    Attributes:
        compared: Answers compared so far.
        skipped: Answers that it had no time to compare, or while the reference was disabled.
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
        """Stop comparing answers, and close the reference."""
        with self._lock:
            self._closed = True
            self._comparisons.clear()
        self._reference.close(0.0)

    def _compare(self, link: ChainLink, patches: NDArray[np.float32], grid: Grid, rows: NDArray[np.float32]) -> None:
        if not self._reference.ready:
            with self._lock:
                self.skipped += 1
            return
        started = time.perf_counter()
        answer = self._reference.encode(patches, [grid], purpose="shadow")
        if isinstance(answer, VisionAccelError):
            if not self._closed:
                logger.error("The reference could not encode an image for comparison: %s", answer)
            return
        reference = self._reference.encoder_if_open
        assert reference is not None, "it has answered"
        expected = as_numpy(answer)
        cosine, failure = drift_of(rows, expected, self._limit, reference.tower.spec.out)
        if link.encoder_if_open is not None:
            report_comparison(link.encoder_if_open, "shadow", started, cosine, self._limit, failure)
        if failure is not None and not self._closed:
            self.drifted += 1
            name = f"an image of grid {grid} that a client sent"
            evidence = Golden(name, "", (grid,), patches, np.array(expected, np.float32), self._limit)
            link.distrust(f"the reference does not agree on {name}: {failure}", evidence)
        self.compared += 1  # last: then everything that follows from the comparison has happened


class GuardedEncoder:
    """A chain of encoders: the first healthy one that can encode an item answers it.

    Several items are encoded in one call if possible, and otherwise one by one. This is the only place that retries:
    an item with a wrong answer (`OutputError`) is tried once more on the same device, then goes down the chain, as does
    an item that the device fails on. The last encoder of the chain tries once more after any other error too.

    Args:
        primary: The chosen encoder.
        others: The links that take over, in this order: other devices that compute the same, then fallbacks.
        shadow: Compares a share of the chosen encoder's answers with the reference's.

    Attributes:
        links: All links of the chain, the chosen encoder's first.
        fallback_items: Items that a fallback encoded so far.
        failed_items: Items that no encoder could encode so far.
    """

    def __init__(
        self, primary: Encoder | ChainLink, others: Sequence[ChainLink] = (), shadow: Shadow | None = None
    ) -> None:
        first = primary if isinstance(primary, ChainLink) else ChainLink(primary.backend, primary)
        encoder = first.encoder_if_open
        assert encoder is not None, "the first of a chain is open"
        self.primary = encoder
        self.links = (first, *others)
        self.shadow = shadow
        self._owner = os.getpid()
        self._counting = threading.Lock()
        self.fallback_items = 0
        self.failed_items = 0

    def described(self, how: str) -> str:
        """Say for logs what encodes, and `how`: in-line, for example."""
        primary, capabilities = self.primary, self.primary.capabilities
        takes = ", ".join(str(opened.program.coverage) for opened in primary.programs)
        fallback = ", ".join(link.name for link in self.links[1:] if not link.same) or "none"
        return (
            f"the vision encoder runs on backend {primary.backend!r}, device {capabilities.device}"
            f"{' (simulated)' if capabilities.simulated else ''}, {capabilities.precision} arithmetic, {how}, and "
            f"takes {takes}; fallback: {fallback}"
        )

    @property
    def closed(self) -> bool:
        """Whether the chosen encoder was closed."""
        return self.primary.closed

    @property
    def stuck_for(self) -> float:
        """For how many seconds no link could be used because one hangs; 0 if one can be used, or none hangs."""
        hangs = [link.breaker.hangs_for for link in self.links if link.breaker.hangs_for]
        return min(hangs) if hangs and not self._turns() else 0.0

    def encode_items(
        self,
        patches: Array,
        grids: Sequence[GridLike],
        queue_seconds: float | None = None,
        *,
        until: float | None = None,
    ) -> list[Embedded | VisionAccelError]:
        """Return the embeddings of each item, or its error. Never raises for bad data.

        Args:
            patches: float32, float16 or bfloat16 [P, patch_width] of all items.
            grids: (t, h, w) of each item.
            queue_seconds: How long the first item waited, for reports.
            until: The latest time to return, on the monotonic clock: an item without an answer by then gets a
                DeadlineError.
        """
        if os.getpid() != self._owner:  # a fork has no threads for calls, and would wait until the deadline
            forked = DeviceError("the device was opened by a different process.", hint="Open it after the fork.")
            return [forked] * len(grids)
        background.resume()
        merge = self.primary.tower.merge_size
        try:
            checked = as_grids(grids, merge)
            if total_patches(checked) != len(patches):
                check_patches(patches, checked, self.primary.tower.patch_width)  # refuses the mismatch
        except InputError as error:  # it is unknown which rows belong to which item, so every item gets the error
            return self._failed(error, len(grids))
        turns = self._turns()
        if turns and _over(until):
            return self._failed(no_time(), len(checked))
        items = list(zip(split_rows(patches, [grid.patches for grid in checked]), checked, strict=True))
        late: dict[ChainLink, VisionAccelError] = {}
        retry = True
        if len(items) > 1 and turns:
            link = turns[0]
            whole = link.encode(patches, checked, queue_seconds, self._following(link) or RETRY, until=until)
            if not isinstance(whole, VisionAccelError):
                rows = split_rows(whole, [grid.tokens(merge) for grid in checked])
                return [self._done(link, *item, each) for item, each in zip(items, rows, strict=True)]
            if isinstance(whole, DeadlineError):
                late[link] = whole
            retry = not isinstance(whole, OutputError)  # encoding each item alone is the second try
        return [self._one(*item, late, retry, queue_seconds, until) for item in items]

    def close(self, wait: float | None = None) -> None:
        """Close every encoder that was opened, even if one of them raises an error.

        Args:
            wait: See `ChainLink.close`.
        """
        with ExitStack() as closing:  # the last callback runs first
            for link in reversed(self.links):
                closing.callback(link.close, wait)
            if self.shadow is not None:
                closing.callback(self.shadow.close)

    def _one(
        self,
        patches: Array,
        grid: Grid,
        late: Mapping[ChainLink, VisionAccelError],
        retry: bool,
        queue_seconds: float | None,
        until: float | None,
    ) -> Embedded | VisionAccelError:
        """Encode one item down the chain, without the links that were late with it already."""
        errors = dict(late)
        while (link := next((each for each in self._turns() if each not in errors), None)) is not None:
            if _over(until):
                errors[link] = no_time()
                break
            following = self._following(link)
            answer = link.encode(patches, [grid], queue_seconds, following or (RETRY if retry else None), until=until)
            if isinstance(answer, VisionAccelError) and retry and self._asked_again(link, answer):
                answer = link.encode(patches, [grid], following=self._following(link), until=until)
            if not isinstance(answer, VisionAccelError):
                return self._done(link, patches, grid, answer, next(iter(errors.values()), None))
            errors[link] = answer
            if _is_own_fault(answer):
                break
        return self._failed(self._together(errors) if errors else self._unhealthy(), 1)[0]

    def _asked_again(self, link: ChainLink, error: VisionAccelError) -> bool:
        """Return whether a link tries again: after a wrong answer, or after a failure if it is the last."""
        if not worth_a_retry(error) or link not in self._turns():
            return False
        return isinstance(error, OutputError) or self._following(link) is None

    def _turns(self) -> list[ChainLink]:
        """Return the links that can be used now, in order: healthy ones, or else those disabled only for failures."""
        ready = [link for link in self.links if link.ready]
        return ready or [link for link in self.links if link.may_try]

    def _following(self, link: ChainLink) -> str | None:
        """Return the name of the encoder that is next after this one."""
        turns = self._turns()
        after = turns[turns.index(link) + 1 :] if link in turns else turns
        return next((other.name for other in after), None)

    def _done(
        self,
        link: ChainLink,
        patches: Array,
        grid: Grid,
        rows: Array,
        error: VisionAccelError | None = None,
    ) -> Embedded:
        first = self.links[0]
        fallback = not (link is first or link.same)
        if fallback:
            with self._counting:
                self.fallback_items += 1
                number = self.fallback_items
            logger.warning(
                "Backend %r failed on grid %s; using fallback %r (%d images so far): %s",
                self.primary.backend, grid, link.name, number, error or first.why_not,
            )  # fmt: skip
        elif self.shadow is not None:
            self.shadow.offer(link, patches, grid, rows)
        return Embedded(rows, fallback)

    def _together(self, errors: Mapping[ChainLink, VisionAccelError]) -> VisionAccelError:
        """Return the error of an item that no encoder could encode."""
        first, last = next(iter(errors.values())), list(errors.values())[-1]
        more = [f"The fallback {link.name!r} failed too: {errors[link].message}" for link in list(errors)[1:]]
        if not _is_own_fault(last):
            more += [link.why_not for link in self.links if link not in errors and not link.ready]
        return DeviceError(" ".join([first.message, *more]), hint=last.hint) if more else first

    def _unhealthy(self) -> DeviceError:
        message = f"no encoder is healthy: {'; '.join(link.why_not for link in self.links)}"
        if self.stuck_for:
            hint = "Restart the server. VISIONACCEL_ISOLATION=process ends and restarts a device that hangs."
            return DeviceLostError(message, hint=hint)
        return DeviceError(message, hint="They are probed again soon; see the log, or set VISIONACCEL_FALLBACK.")

    def _failed(self, error: VisionAccelError, items: int) -> list[Embedded | VisionAccelError]:
        with self._counting:
            self.failed_items += items
        return [error] * items


def _over(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until


def _is_own_fault(error: VisionAccelError) -> bool:
    """Return whether an item's data is wrong, so that no other encoder helps."""
    return isinstance(error, InputError) and not isinstance(error, UnfitGridError)


def _copied(array: Array) -> NDArray[np.float32]:
    return np.array(as_numpy(array), dtype=np.float32)
