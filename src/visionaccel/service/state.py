"""The state of an encode service, under one lock: which items wait or run, and which futures they answer.

These rules hold between any two calls, on any schedule:

- At most one item with a given key waits or runs. An equal item that arrives then joins it.
- Every future belongs to one such item until it is answered, once, or cancelled by its holder.
- At most `size` items wait. Urgent items go first, then those that arrived first.
- A waiting item that loses its last future is dropped, with its patches.
- After `close` no item enters; after `abandon` no future is open.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from numpy.typing import NDArray

from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid
from visionaccel.errors import DeadlineError, QueueFullError, ServiceClosedError, VisionAccelError
from visionaccel.service.cache import EmbeddingCache

Embedding: TypeAlias = NDArray[Any]
"""Embeddings [tokens, out_width] of one item, in the service's dtype, read-only."""

_PERIOD = 0.02
_NEW = "Open a new one."


@dataclass
class ServiceCounters:
    """What a service has done so far, and what it is doing.

    Attributes:
        submitted: Items that were accepted.
        encoded: Items that a device or a fallback encoded.
        fallback: Encoded items that a fallback encoded.
        cached: Items whose embedding was in the cache.
        merged: Items that equalled one in the service, and joined it.
        failed: Items that could not be encoded, including those past a deadline.
        expired: Items whose call was past its deadline.
        cancelled: Items that were cancelled while they waited.
        busy_seconds: Seconds that devices spent on items, over all devices.
        waiting: Items that wait for a device now.
        running: Items that are being encoded now.
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
    """One image or video on its way through a service."""

    key: str
    patches: Array  # [P, patch_width]; None once the item is done
    grid: Grid
    arrival: float  # on any clock, the same for all items of a service
    urgent: bool = False
    submitted: float = field(default_factory=time.monotonic)
    futures: set[Future[Embedding]] = field(default_factory=set)

    @property
    def turn(self) -> tuple[bool, float, float]:
        """The sort key: urgent items go first, then those that arrived first."""
        return not self.urgent, self.arrival, self.submitted


class ServiceState:
    """The items of an encode service. Safe to use from any thread; futures are answered without the lock.

    An embedding must be in the cache before its item is finished.
    """

    def __init__(self, size: int, cache: EmbeddingCache) -> None:
        self._size, self._cache = size, cache
        self._changed = threading.Condition()
        self._by_key: dict[str, Item] = {}
        self._waiting: set[Item] = set()
        self._watchers: list[Future[None]] = []
        self._counters = ServiceCounters()
        self._closed = False

    @property
    def counters(self) -> ServiceCounters:
        """A snapshot of the counters."""
        with self._changed:
            waiting = len(self._waiting)
            return replace(self._counters, waiting=waiting, running=len(self._by_key) - waiting)

    @property
    def room(self) -> bool:
        """Whether the queue accepts any item at once."""
        return len(self._waiting) < self._size and not self._closed

    def enter(self, item: Item, timeout: float | None) -> Future[Embedding]:
        """Accept a new item: join an equal one, answer from the cache, or queue it.

        Raises:
            QueueFullError: If there was no room within the timeout.
            ServiceClosedError: If the service is closed.
        """
        with self._changed:
            future = self._changed.wait_for(partial(self._entered, item), timeout)
        if future is None:
            raise QueueFullError(
                f"the queue of the encode service is full{f', and has been for {timeout:g} s' if timeout else ''}.",
                hint="Try again later, or raise VISIONACCEL_QUEUE_SIZE.",
            )
        return future

    def next_change(self) -> Future[None]:
        """Return a future that is done when there may be room, or the service is closed."""
        watcher: Future[None] = Future()
        with self._changed:
            self._watchers.append(watcher)
            if self.room or self._closed:
                self._notify()
        return watcher

    def take(self, may: Callable[[Item], bool]) -> Item | None:
        """Wait for an item that the caller may encode, and return the first; None if the service is closed and empty.

        While the caller may encode none of the waiting items, `may` is asked again every 20 ms; after `close` it is
        not asked.
        """
        with self._changed:
            while True:
                turns = sorted(self._waiting, key=lambda each: each.turn)
                item = next((each for each in turns if self._closed or may(each)), None)
                if item is not None:
                    self._waiting.remove(item)
                    self._notify()
                    return item
                if self._closed:
                    return None
                self._changed.wait(_PERIOD if turns else None)

    def finish(self, item: Item, result: Embedding | VisionAccelError, seconds: float, *, fallback: bool) -> None:
        """Answer an item that ran, and count the seconds that its device was busy."""
        with self._changed:
            counters = self._counters
            counters.busy_seconds += seconds
            if self._by_key.get(item.key) is not item:
                return  # abandoned
            if not isinstance(result, VisionAccelError):
                counters.encoded += 1
                counters.fallback += fallback
            elif item.futures:
                counters.failed += 1
                counters.expired += isinstance(result, DeadlineError)
            futures = self._done([item])
        _answer(futures, result)

    def close(self, *, drain: bool) -> None:
        """Accept no more items. Fail those that wait, or leave them for the devices."""
        with self._changed:
            self._closed = True
            futures = self._done([] if drain else self._waiting)
        _answer(futures, ServiceClosedError("the encode service is closed.", hint=_NEW))

    def abandon(self) -> None:
        """Fail the items of calls that do not return."""
        with self._changed:
            futures = self._done(self._by_key.values())
        _answer(futures, ServiceClosedError("the encode service was closed while it encoded the item.", hint=_NEW))

    def _cancelled(self, item: Item, future: Future[Embedding]) -> None:
        """Remove a future; drop the item if it waits and this was its last future."""
        if not future.cancelled():
            return
        with self._changed:
            item.futures.discard(future)
            if not item.futures and item in self._waiting:
                self._counters.cancelled += 1
                self._done([item])

    # With the lock held:

    def _entered(self, item: Item) -> Future[Embedding] | None:
        """Try to accept an item; None if there is no room."""
        if self._closed:
            raise ServiceClosedError("the encode service is closed.", hint=_NEW)
        twin = self._by_key.get(item.key)
        known = self._cache.get(item.key) if twin is None else None
        if twin is None and known is None and not self.room:
            return None
        future: Future[Embedding] = Future()
        self._counters.submitted += 1
        if known is not None:
            self._counters.cached += 1
            future.set_result(known)
            return future
        if twin is None:
            twin = self._by_key[item.key] = item
            self._waiting.add(item)
            self._notify()
        else:
            self._counters.merged += 1
            twin.urgent, twin.arrival = twin.urgent or item.urgent, min(twin.arrival, item.arrival)
        twin.futures.add(future)
        future.add_done_callback(partial(self._cancelled, twin))
        return future

    def _done(self, items: Iterable[Item]) -> list[Future[Embedding]]:
        """Remove items, and collect the futures to resolve."""
        futures: list[Future[Embedding]] = []
        for item in list(items):
            self._waiting.discard(item)
            del self._by_key[item.key]
            futures += item.futures
            item.futures, item.patches = set(), None
        self._notify()
        return futures

    def _notify(self) -> None:
        self._changed.notify_all()
        watchers, self._watchers = self._watchers, []
        _answer(watchers, None)


def _answer(futures: Iterable[Future[Any]], result: Embedding | VisionAccelError | None) -> None:
    for future in futures:
        if not future.set_running_or_notify_cancel():
            continue  # cancelled since the lock was released
        if isinstance(result, VisionAccelError):
            future.set_exception(result)
        else:
            future.set_result(result)
