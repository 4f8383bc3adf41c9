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
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from numpy.typing import NDArray

from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid
from visionaccel.errors import DeadlineError, ServiceClosedError, VisionAccelError
from visionaccel.service.cache import EmbeddingCache
from visionaccel.trust import Embedded

Embedding: TypeAlias = NDArray[Any]
"""Embeddings [tokens, out_width] of one item, in the service's dtype, read-only."""

_PERIOD = 0.02
_NEW = "Open a new one."


@dataclass
class ServiceCounters:
    """What a service has done so far, and what it is doing now."""

    submitted: int = 0  #: Items that were accepted.
    encoded: int = 0  #: Items that a device or a fallback encoded.
    fallback: int = 0  #: Encoded items that a fallback encoded.
    cached: int = 0  #: Items whose embedding was in the cache.
    merged: int = 0  #: Items that equalled one in the service, and joined it.
    failed: int = 0  #: Items that could not be encoded, including those past a deadline.
    expired: int = 0  #: Items whose call was past its deadline.
    cancelled: int = 0  #: Items that were cancelled while they waited.
    busy_seconds: float = 0.0  #: Seconds that devices spent on items, over all devices.
    waiting: int = 0  #: Items that wait for a device now.
    running: int = 0  #: Items that are being encoded now.


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


class ServiceState:
    """The items of an encode service. Safe to use from any thread; futures are answered without the lock.

    An embedding must be in the cache before its item is finished. `change` is a future that is done at the next change
    of the items: read it before you look at them and possibly wait.
    """

    def __init__(self, size: int, cache: EmbeddingCache) -> None:
        self._size, self._cache = size, cache
        self._lock = threading.Lock()
        self.change = _new_change()
        self._by_key: dict[str, Item] = {}
        self._waiting: set[Item] = set()
        self._counters = ServiceCounters()
        self._closed = False

    @property
    def counters(self) -> ServiceCounters:
        """A snapshot of the counters."""
        with self._lock:
            waiting = len(self._waiting)
            return replace(self._counters, waiting=waiting, running=len(self._by_key) - waiting)

    @property
    def room(self) -> bool:
        """Whether the queue can accept an item now."""
        return len(self._waiting) < self._size and not self._closed

    def enter(self, item: Item) -> Future[Embedding] | None:
        """Accept a new item: join an equal one, answer from the cache, or queue it. Returns None if the queue is full.

        Raises:
            ServiceClosedError: If the service is closed.
        """
        future: Future[Embedding] = Future()
        with self._lock:
            if self._closed:
                raise ServiceClosedError("the encode service is closed.", hint=_NEW)
            counters, twin = self._counters, self._by_key.get(item.key)
            known = self._cache.get(item.key) if twin is None else None
            if twin is not None:
                counters.merged += 1
                twin.urgent, twin.arrival = twin.urgent or item.urgent, min(twin.arrival, item.arrival)
                item = twin
            elif known is not None:
                counters.cached += 1
                future.set_result(known)
            elif self.room:
                self._by_key[item.key] = item
                self._waiting.add(item)
                self._changed()
            else:
                return None
            counters.submitted += 1
            if known is None:
                item.futures.add(future)
                future.add_done_callback(partial(self._cancelled, item))
        return future

    def take(self, least_wait: Callable[[], float]) -> Item | None:
        """Wait for an item to encode, and return the first; None if the service is closed and empty.

        Until `close`, only items that have waited for `least_wait()` seconds are taken; it is called every 20 ms while
        none has.
        """
        while True:
            with self._lock:
                latest = time.monotonic() - (0.0 if self._closed else least_wait())
                ripe = [item for item in self._waiting if item.submitted <= latest]
                if ripe:
                    item = min(ripe, key=lambda each: (not each.urgent, each.arrival, each.submitted))
                    self._waiting.remove(item)
                    self._changed()
                    return item
                if self._closed:
                    return None
                change, period = self.change, _PERIOD if self._waiting else None
            wait([change], period)

    def finish(self, item: Item, answer: Embedded | VisionAccelError, seconds: float) -> None:
        """Answer an item that ran, and count the seconds that its device was busy."""
        with self._lock:
            counters = self._counters
            counters.busy_seconds += seconds
            if self._by_key.get(item.key) is not item:
                return  # abandoned
            if isinstance(answer, Embedded):
                counters.encoded += 1
                counters.fallback += answer.fallback
            elif item.futures:
                counters.failed += 1
                counters.expired += isinstance(answer, DeadlineError)
            futures = self._removed([item])
        _answer(futures, answer)

    def close(self, *, drain: bool) -> None:
        """Stop accepting items. Fail those that wait, or leave them for the devices."""
        with self._lock:
            self._closed = True
            futures = self._removed([] if drain else self._waiting)
        _answer(futures, ServiceClosedError("the encode service is closed.", hint=_NEW))

    def abandon(self) -> None:
        """Fail the items of calls that do not return."""
        with self._lock:
            futures = self._removed(self._by_key.values())
        _answer(futures, ServiceClosedError("the encode service was closed while it encoded the item.", hint=_NEW))

    def _cancelled(self, item: Item, future: Future[Embedding]) -> None:
        """Remove a future; drop the item if it waits and this was its last future."""
        if not future.cancelled():
            return
        with self._lock:
            item.futures.discard(future)
            if not item.futures and item in self._waiting:
                self._counters.cancelled += 1
                self._removed([item])

    # With the lock held:

    def _removed(self, items: Iterable[Item]) -> list[Future[Embedding]]:
        """Remove items, and return the futures to answer."""
        futures: list[Future[Embedding]] = []
        for item in list(items):
            self._waiting.discard(item)
            del self._by_key[item.key]
            futures += item.futures
            item.futures, item.patches = set(), None
        self._changed()
        return futures

    def _changed(self) -> None:
        """Wake everything that waits for a change."""
        change, self.change = self.change, _new_change()
        change.set_result(None)


def _new_change() -> Future[None]:
    """Return a future that no waiter can cancel, because it counts as running."""
    change: Future[None] = Future()
    change.set_running_or_notify_cancel()
    return change


def _answer(futures: Iterable[Future[Embedding]], answer: Embedded | VisionAccelError) -> None:
    for future in futures:
        if not future.set_running_or_notify_cancel():
            continue  # cancelled since the lock was released
        if isinstance(answer, VisionAccelError):
            future.set_exception(answer)
        else:
            future.set_result(answer.rows)
