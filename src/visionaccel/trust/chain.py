"""An encoder that answers item by item: one image's fault never costs another its embeddings."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from visionaccel.core.arrays import Array
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
from visionaccel.trust.link import RETRY, ChainLink
from visionaccel.trust.shadow import Shadow
from visionaccel.trust.watched_encoder import no_time

logger = safe_logger(__name__)


@dataclass(frozen=True, slots=True)
class Embedded:
    """One item's embeddings and where they come from.

    Attributes:
        rows: float32 [tokens, out_width], numpy or torch; the caller's.
        fallback: A fallback computed them, in other arithmetic than the chosen encoder's.
    """

    rows: Array
    fallback: bool = False


class GuardedEncoder:
    """A chain of encoders: each item gets its answer from the first that is healthy and can give it.

    Several items are encoded in one call where that works, and one by one where it does not. This is the only place
    that retries: an item with a wrong answer (`OutputError`) is tried once more on the same device, then goes down the
    chain, as does one that the device fails on. Where nothing follows, any other error is tried once more too.

    Args:
        primary: The chosen encoder.
        others: What takes over, the preferred first: other devices that compute the same, then fallbacks.
        shadow: Has the reference look at a share of what the chosen encoder answers.

    Attributes:
        primary: The chosen encoder.
        links: All of the chain, the chosen one first.
        shadow: What compares, if anything does.
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
        self._counting = threading.Lock()
        self.fallback_items = 0
        self.failed_items = 0

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.primary.closed

    @property
    def stuck_for(self) -> float:
        """Seconds since when no link may be asked because one hangs; 0 if one may, or none hangs.

        What waits may be answered later.
        """
        return 0.0 if self._turns() else min((link.hangs_for for link in self.links if link.hangs_for), default=0.0)

    def encode_items(
        self,
        patches: Array,
        grids: Sequence[GridLike],
        queue_seconds: float | None = None,
        *,
        until: float | None = None,
    ) -> list[Embedded | VisionAccelError]:
        """Embeddings of each item, or the error that this item alone must answer for. Never raises for bad data.

        Each encoder that is asked has its deadline for each call, and nothing else takes long.

        Args:
            patches: float32, float16 or bfloat16 [P, patch_width] of all items.
            grids: (t, h, w) of each item.
            queue_seconds: How long the first of them waited, for reports.
            until: When all items must have their answers, on the monotonic clock, whatever encoders do: an item that
                has none by then gets a DeadlineError. None for no such time.

        Returns:
            One entry for each grid: its embeddings, or the error.
        """
        merge = self.primary.tower.merge_size
        try:
            checked = as_grids(grids, merge)
            if total_patches(checked) != len(patches):
                # Which rows belong to which item is unknown, so every item gets the error.
                found = self.links[0].encode(patches, checked, until=until)
                assert isinstance(found, VisionAccelError)  # the encoder refuses what disagrees
                return self._failed(found, len(checked))
        except InputError as error:
            return self._failed(error, len(grids))
        link = next(iter(self._turns()), None)
        if link is None:
            return self._failed(self._unhealthy(), len(checked))
        ends = np.cumsum([grid.patches for grid in checked]).tolist()
        starts = [0, *ends[:-1]]
        if until is not None and time.monotonic() >= until:
            return self._failed(no_time(), len(checked))
        following = self._following(link) or RETRY
        whole = link.encode(patches, checked, queue_seconds, following, until=until)
        if not isinstance(whole, VisionAccelError):
            stops = np.cumsum([grid.tokens(merge) for grid in checked]).tolist()
            rows = [whole[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
            items = [patches[start:end] for start, end in zip(starts, ends, strict=True)]
            return [self._done(link, *each) for each in zip(items, checked, rows, strict=True)]
        known = (link, whole) if len(checked) == 1 or isinstance(whole, DeadlineError) else None
        again = not isinstance(whole, OutputError)  # of several, encoding each alone is the second try
        return [
            self._one(patches[start:end], grid, known, again or known is not None, queue_seconds, until)
            for start, end, grid in zip(starts, ends, checked, strict=True)
        ]

    def close(self, wait: float | None = None) -> None:
        """Close every encoder that was opened.

        Args:
            wait: As for `ChainLink.close`.
        """
        if self.shadow is not None:
            self.shadow.close()
        for link in self.links:
            link.close(wait)

    def _one(
        self,
        patches: Array,
        grid: Grid,
        known: tuple[ChainLink, VisionAccelError] | None,
        retry: bool,
        queue_seconds: float | None,
        until: float | None,
    ) -> Embedded | VisionAccelError:
        """One item alone, down the chain.

        Args:
            patches: Its patches.
            grid: Its grid.
            known: An encoder that has tried already, and what went wrong.
            retry: Whether a failure is tried a second time, where that makes sense.
            queue_seconds: How long it waited.
            until: As for `encode_items`.
        """
        errors: list[tuple[ChainLink, VisionAccelError]] = []

        def turns() -> Iterator[tuple[ChainLink, VisionAccelError | None]]:
            if known is not None:
                yield known
            yield from ((link, None) for link in self._turns() if known is None or link is not known[0])

        for link, error in turns():
            if error is None and until is not None and time.monotonic() >= until:
                errors.append((link, no_time()))
                break
            answer = error or link.encode(patches, [grid], queue_seconds, self._following(link), until=until)
            if isinstance(answer, VisionAccelError) and retry and self._worth_a_retry(link, answer):
                answer = link.encode(patches, [grid], following=self._following(link), until=until)
            if not isinstance(answer, VisionAccelError):
                return self._done(link, patches, grid, answer, errors)
            errors.append((link, answer))
            if _is_own_fault(answer):
                break
        return self._failed(self._together(errors) if errors else self._unhealthy(), 1)[0]

    def _worth_a_retry(self, link: ChainLink, error: VisionAccelError) -> bool:
        """Whether a link is asked a second time: for a wrong answer, or a failure where nothing follows.

        A call that was late, or ended its process, is not repeated: the same image may do that again.
        """
        if not isinstance(error, DeviceError) or isinstance(error, DeadlineError | DeviceLostError):
            return False
        return link in self._turns() and (isinstance(error, OutputError) or self._following(link) is None)

    def _turns(self) -> list[ChainLink]:
        """The links that may be asked now, in turn: the healthy; if there are none, those that only failed often."""
        ready = [link for link in self.links if link.ready]
        return ready or [link for link in self.links if link.may_try]

    def _following(self, link: ChainLink) -> str | None:
        """The encoder that would have its turn after this one."""
        turns = self._turns()
        after = turns[turns.index(link) + 1 :] if link in turns else turns
        return next((other.name for other in after), None)

    def _done(
        self,
        link: ChainLink,
        patches: Array,
        grid: Grid,
        rows: Array,
        errors: Sequence[tuple[ChainLink, VisionAccelError]] = (),
    ) -> Embedded:
        first = self.links[0]
        fallback = not (link is first or link.same)
        if fallback:
            with self._counting:
                self.fallback_items += 1
                number = self.fallback_items
            why = str(errors[0][1]) if errors else first.why_not
            logger.warning(
                "Backend %r failed on grid %s; the fallback took over, for the %d. time, on %r: %s",
                self.primary.backend,
                grid,
                number,
                link.name,
                why,
            )
        elif self.shadow is not None:
            self.shadow.offer(link, patches, grid, rows)
        return Embedded(rows, fallback)

    def _together(self, errors: Sequence[tuple[ChainLink, VisionAccelError]]) -> VisionAccelError:
        """The error of an item that every encoder failed on."""
        (_, first), *others = errors
        more = [f"The fallback {link.name!r} failed too: {error.message}" for link, error in others]
        asked = {link for link, _ in errors}
        if not _is_own_fault(errors[-1][1]):
            more += [link.why_not for link in self.links if link not in asked and not link.ready]
        return DeviceError(" ".join([first.message, *more]), hint=errors[-1][1].hint) if more else first

    def _unhealthy(self) -> DeviceError:
        message = f"no encoder is healthy: {'; '.join(link.why_not for link in self.links)}"
        if self.stuck_for:
            hint = "Restart the server. VISIONACCEL_ISOLATION=process ends and restarts a device that hangs."
            return DeviceLostError(message, hint=hint)
        return DeviceError(message, hint="It is probed again soon; see the log, or set VISIONACCEL_FALLBACK.")

    def _failed(self, error: VisionAccelError, items: int) -> list[Embedded | VisionAccelError]:
        with self._counting:
            self.failed_items += items
        return [error] * items


def _is_own_fault(error: VisionAccelError) -> bool:
    """Whether an item's own data is wrong, which no other encoder mends."""
    return isinstance(error, InputError) and not isinstance(error, UnfitGridError)
