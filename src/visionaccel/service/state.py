"""What is in an encode service, under one lock: which items wait or run, and which futures they answer.

These hold between any two calls, on any schedule:

- Of items with one key, at most one waits or runs. An equal one that comes then joins it.
- Every future that was handed out belongs to one such item until it is answered, once, or its holder cancels it.
- At most `size` items wait. Urgent ones go first, then those that arrived first.
- An item that waits and loses its last future is dropped, with its patches.
- Once the service is closed nothing enters; after `abandon` no future is open.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from numpy.typing import NDArray

from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid
from visionaccel.errors import DeadlineError, QueueFullError, ServiceClosedError, VisionAccelError
from visionaccel.service.cache import EmbeddingCache

Embedding: TypeAlias = NDArray[Any]
"""[tokens, out_width] of one item, read-only."""

_PERIOD = 0.02
_NEW = "Open a new one."


@dataclass(frozen=True)
class ServiceCounters:
    """What a service has done so far, and what it is doing.

    Attributes:
        submitted: Items that were taken in.
        encoded: Items that a device or the fallback encoded.
        fallback: Those of them that the fallback encoded.
        cached: Items whose embedding was in the cache.
        merged: Items that were equal to one in the service, and were not encoded a second time.
        failed: Items that could not be encoded, those past a deadline included.
        expired: Items whose call was past its deadline.
        cancelled: Items that were cancelled before a device took them.
        busy_seconds: Seconds that devices spent on items, over all devices.
        waiting: Items that wait for a device now.
        running: Items that devices encode now.
    """

    submitted: int = 0
    encoded: int = 0
    fallback: int = 0
    cached: int = 0
    merged: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    busy_seconds: float = 0.0
    waiting: int = 0
    running: int = 0


@dataclass(eq=False)
class Item:
    """One image or video on its way through a service.

    Attributes:
        key: What its embedding is kept under.
        patches: [P, patch_width], as submitted; None once it is done.
        grid: Its grid.
        arrival: Items that arrived earlier go first; any clock, the same for all of a service.
        urgent: It goes before all that are not.
        submitted: When it was submitted, on the monotonic clock.
        futures: Those that it answers.
    """

    key: str
    patches: Array
    grid: Grid
    arrival: float
    urgent: bool = False
    submitted: float = field(default_factory=time.monotonic)
    futures: set[Future[Embedding]] = field(default_factory=set)

    @property
    def order(self) -> tuple[bool, float, float, int]:
        """Sorts items by their turn."""
        return not self.urgent, self.arrival, self.submitted, id(self)


class ServiceState:
    """The items of an encode service. Safe to use from any thread; futures are answered without the lock.

    Args:
        size: Most items that wait.
        cache: Where embeddings are kept. One must be in it before its item is finished.
    """

    def __init__(self, size: int, cache: EmbeddingCache) -> None:
        self._size, self._cache = size, cache
        self._changed = threading.Condition()
        self._by_key: dict[str, Item] = {}
        self._waiting: list[Item] = []
        self._counts: Counter[str] = Counter()
        self._busy_seconds = 0.0
        self._closed = False

    @property
    def counters(self) -> ServiceCounters:
        """A snapshot."""
        with self._changed:
            waiting = len(self._waiting)
            running = len(self._by_key) - waiting
            return ServiceCounters(**self._counts, busy_seconds=self._busy_seconds, waiting=waiting, running=running)

    @property
    def room(self) -> bool:
        """Whether any item would be taken in at once."""
        return len(self._waiting) < self._size and not self._closed

    def enter(self, item: Item, timeout: float | None) -> Future[Embedding]:
        """Take in an item: join its equal, answer it from the cache, or queue it.

        Args:
            item: A new one.
            timeout: Seconds to wait for room; None for as long as it takes.

        Raises:
            QueueFullError: If there was no room in time.
            ServiceClosedError: If the service is closed.
        """
        future: Future[Embedding] = Future()
        known: Embedding | None = None

        def settled() -> bool:
            nonlocal known
            equal = item.key in self._by_key
            known = None if equal else self._cache.get(item.key)
            return self._closed or equal or known is not None or self.room

        with self._changed:
            if not self._changed.wait_for(settled, timeout):
                raise QueueFullError(
                    f"the queue of the encode service is full{f', and has been for {timeout:g} s' if timeout else ''}.",
                    hint="Try again later, or raise VISIONACCEL_QUEUE_SIZE.",
                )
            if self._closed:
                raise ServiceClosedError("the encode service is closed.", hint=_NEW)
            self._counts["submitted"] += 1
            if known is not None:
                self._counts["cached"] += 1
                future.set_result(known)
                return future
            twin = self._by_key.setdefault(item.key, item)
            if twin is item:
                insort(self._waiting, item, key=_order)
                self._changed.notify_all()
            else:
                self._counts["merged"] += 1
                self._hurry(twin, item)
            twin.futures.add(future)
        future.add_done_callback(partial(self._cancelled, twin))
        return future

    def take(self, may: Callable[[Item], bool]) -> Item | None:
        """The first item that the caller may encode, once there is one; it runs then. None if no more will come.

        Args:
            may: Whether the caller may encode an item; asked again soon if not. Closing does not wait for that.
        """
        with self._changed:
            while True:
                item = next((each for each in self._waiting if self._closed or may(each)), None)
                if item is not None:
                    self._leave(item)
                    return item
                if self._closed:
                    return None
                self._changed.wait(_PERIOD if self._waiting else None)

    def finish(self, item: Item, result: Embedding | VisionAccelError, seconds: float, *, fallback: bool) -> None:
        """Answer an item that ran.

        Args:
            item: The item.
            result: Its answer.
            seconds: How long its device was busy with it.
            fallback: A fallback encoded it.
        """
        with self._changed:
            self._busy_seconds += seconds
            if self._by_key.get(item.key) is not item:
                return  # abandoned
            if not isinstance(result, VisionAccelError):
                self._counts["encoded"] += 1
                self._counts["fallback"] += fallback
            elif item.futures:
                self._counts["failed"] += 1
                self._counts["expired"] += isinstance(result, DeadlineError)
            futures = self._done([item])
        _answer(futures, result)

    def close(self, *, drain: bool) -> None:
        """Take nothing in any more; what waits is failed, or left for the devices."""
        with self._changed:
            self._closed = True
            futures = [] if drain else self._done(list(self._waiting))
            self._changed.notify_all()
        _answer(futures, ServiceClosedError("the encode service is closed.", hint=_NEW))

    def abandon(self) -> None:
        """Fail the items of calls that do not return."""
        with self._changed:
            futures = self._done(list(self._by_key.values()))
        _answer(futures, ServiceClosedError("the encode service was closed while the item was encoded.", hint=_NEW))

    def _cancelled(self, item: Item, future: Future[Embedding]) -> None:
        """A future of an item is done. If its holder cancelled it, the item may not be wanted any more."""
        if not future.cancelled():
            return
        with self._changed:
            item.futures.discard(future)
            if not item.futures and self._leave(item):
                self._counts["cancelled"] += 1
                self._done([item])

    # With the lock held:

    def _hurry(self, item: Item, equal: Item) -> None:
        """Let an item that waits have its turn as early as its equal would."""
        waits = self._leave(item)
        item.urgent, item.arrival = item.urgent or equal.urgent, min(item.arrival, equal.arrival)
        if waits:
            insort(self._waiting, item, key=_order)

    def _leave(self, item: Item) -> bool:
        """Take an item out of the queue; whether it was there."""
        place = bisect_left(self._waiting, item.order, key=_order)
        if self._waiting[place : place + 1] != [item]:
            return False
        del self._waiting[place]
        self._changed.notify_all()
        return True

    def _done(self, items: Iterable[Item]) -> list[Future[Embedding]]:
        """Remove items, and collect the futures to resolve."""
        futures: list[Future[Embedding]] = []
        for item in items:
            self._leave(item)
            del self._by_key[item.key]
            futures += item.futures
            item.futures, item.patches = set(), None
        self._changed.notify_all()
        return futures


def _order(item: Item) -> tuple[bool, float, float, int]:
    return item.order


def _answer(futures: Iterable[Future[Embedding]], result: Embedding | VisionAccelError) -> None:
    for future in futures:
        if not future.set_running_or_notify_cancel():
            continue  # cancelled since the lock was released
        if isinstance(result, VisionAccelError):
            future.set_exception(result)
        else:
            future.set_result(result)
