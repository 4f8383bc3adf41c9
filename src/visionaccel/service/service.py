"""The encode service: a bounded queue in front of one encoder for each device, with futures for answers.

On any schedule of calls, cancellations, faults, hangs and `close`, every future ends, with its item's answer or error.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Self

import numpy as np

from visionaccel.core.arrays import Array, as_numpy, dtype_name, split_rows
from visionaccel.core.defaults import CACHE_SIZE, QUEUE_SIZE
from visionaccel.core.dtypes import FLOATS
from visionaccel.core.grid import Grid, GridLike, as_grids, total_patches
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import ConfigurationError, DeviceError, PatchesError, QueueFullError, VisionAccelError
from visionaccel.service.cache import EmbeddingCache, item_key, numerics
from visionaccel.service.state import Embedding, Item, ServiceCounters, ServiceState
from visionaccel.trust import Embedded, GuardedEncoder

logger = safe_logger(__name__)

_MISMATCH = "Pass the pixel_values and the grid_thw of the same processor call."
_TRIES = 3
_CLOSING = 1.0


class EncodeService:
    """Encodes images and videos in order of arrival, on the first free device.

    Safe to use from any thread; use as a context manager or call `close`. Each item is a separate call, and fails
    alone. Equal items that are in the service at one time are encoded once, and embeddings are kept in a cache. A
    device gets one thread, or as many as its backend declares (`Capabilities.max_in_flight`).

    Calls have the deadline of the chain's links. While no link can answer because one hangs, items wait; an item fails
    once both its wait and the hang have lasted for the deadline.

    Args:
        encoders: The chain of each device, which the service closes. All must compute the same numbers.
        queue_size: The maximum number of items that wait for a device.
        cache: The size of a new cache in bytes, or a cache to share.
        dtype: The dtype of the embeddings: `float32`, `bfloat16` (through ml_dtypes) or `float16`.

    Raises:
        ConfigurationError: If `encoders` is empty, the dtype is unknown, or the encoders compute different numbers.
    """

    def __init__(
        self,
        encoders: Sequence[GuardedEncoder],
        *,
        queue_size: int = QUEUE_SIZE,
        cache: int | EmbeddingCache = CACHE_SIZE,
        dtype: str = "float32",
    ) -> None:
        if not encoders:
            raise ConfigurationError(
                "an encode service needs at least one encoder.", hint="Open one with open_encoder."
            )
        if dtype not in FLOATS:
            raise ConfigurationError(
                f"unknown dtype {dtype!r} of embeddings.", hint="Choose float32, bfloat16 or float16."
            )
        self._numerics, *others = {numerics(encoder.primary, dtype) for encoder in encoders}
        if others:
            raise ConfigurationError(
                "all devices of an encode service must run the same programs, with the same backend, precision and "
                "options.",
                hint="Open a service for each kind of device.",
            )
        self.encoders = tuple(encoders)
        self.tower = encoders[0].primary.tower
        self.cache = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache)
        self._dtype = np.dtype(FLOATS[dtype])
        links = {link for encoder in encoders for link in encoder.links}
        self._deadline = max(link.deadline for link in links)
        self._state = ServiceState(queue_size, self.cache)
        self._closing = threading.Lock()
        self._closed = False
        for link in links:
            link.on_drift(self.cache.clear)
        self._threads = {encoder: self._threads_of(encoder) for encoder in encoders}
        try:
            for thread in chain(*self._threads.values()):
                thread.start()
        except BaseException:  # such as RuntimeError: no more threads can be started
            self._state.close(drain=False)
            raise

    @property
    def counters(self) -> ServiceCounters:
        """What the service has done so far, as a snapshot."""
        return self._state.counters

    @property
    def closed(self) -> bool:
        """Whether the service was closed, and every future is done."""
        return self._closed

    @property
    def room(self) -> bool:
        """Whether the queue can accept an item now."""
        return self._state.room

    def bytes_of(self, grid: Grid) -> int:
        """Return the bytes of an embedding of this grid."""
        itemsize: int = self._dtype.itemsize
        return grid.tokens(self.tower.merge_size) * self.tower.out_width * itemsize

    def submit(
        self,
        patches: Array,
        grid: GridLike,
        *,
        key: str | None = None,
        arrival: float | None = None,
        urgent: bool = False,
        timeout: float | None = None,
    ) -> Future[Embedding]:
        """Submit one image or video for encoding.

        Takes microseconds if a key is given and the queue has room. Without a key it reads the patches once.

        Args:
            patches: float32, float16 or bfloat16 [P, patch_width], numpy or torch. Must not change until the future is
                done.
            grid: The item's (t, h, w).
            key: The caller's key, such as vLLM's hash of the image: equal only for equal patches. None to hash them.
            arrival: When the item arrived, if not now; earlier items are encoded first. On the clock of
                `time.monotonic`, unless every caller of the service uses a different one.
            urgent: Encode this item before all that are not urgent.
            timeout: Seconds to wait for room in the queue; None to wait without limit. No room is needed if the
                embedding is in the cache, or an equal item is in the service.

        Returns:
            A future of the embedding, [tokens, out_width] in the service's dtype, read-only and shared with other
            callers that submit an equal item. Cancel the future to withdraw the item. It fails with the item's error:
            InputError for wrong data, DeadlineError, another DeviceError, or ServiceClosedError.

        Raises:
            GridError: If the grid is wrong.
            PatchesError: If the number of patches does not match the grid, or they cannot be read.
            QueueFullError: If the queue had no room within the timeout.
            ServiceClosedError: If the service is closed.
        """
        item = self._item(patches, grid, key, arrival, urgent)
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            change = self._state.change
            future = self._state.enter(item)
            if future is not None:
                return future
            if not wait([change], None if until is None else max(0.0, until - time.monotonic())).done:
                raise QueueFullError(
                    f"the queue of the encode service is full{f', and has been for {timeout:g} s' if timeout else ''}.",
                    hint="Try again later, or raise VISIONACCEL_QUEUE_SIZE.",
                )

    async def submit_async(
        self, patches: Array, grid: GridLike, *, key: str | None = None, arrival: float | None = None
    ) -> Embedding:
        """Submit an item and await its embedding. Cancelling the task cancels the item. Arguments as for `submit`.

        Raises:
            VisionAccelError: The errors of `submit` and of its future.
        """
        item = await asyncio.to_thread(self._item, patches, grid, key, arrival)
        while True:
            change = self._state.change
            future = self._state.enter(item)
            if future is not None:
                return await asyncio.wrap_future(future)
            await asyncio.wrap_future(change)

    def encode(self, patches: Array, grids: Iterable[GridLike]) -> list[Embedding]:
        """Encode several images and videos and wait for all of them.

        Args:
            patches: [P, patch_width] of all items, one after another.
            grids: (t, h, w) of each item.

        Returns:
            One embedding for each grid, like those of `submit`.

        Raises:
            VisionAccelError: The error of the first item that failed; items that still wait are cancelled.
        """
        futures: list[Future[Embedding]] = []
        try:
            futures += (self.submit(rows, grid) for rows, grid in self._split(patches, grids))
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    async def encode_async(self, patches: Array, grids: Iterable[GridLike]) -> list[Embedding]:
        """Like `encode`, without blocking the event loop."""
        tasks = [asyncio.create_task(self.submit_async(*item)) for item in self._split(patches, grids)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self, *, drain: bool = False, wait: float | None = None) -> None:
        """Stop accepting items, complete every future, release the devices and end every thread.

        Args:
            drain: Encode the items that wait first; otherwise they fail with ServiceClosedError.
            wait: Seconds to wait for calls in progress; by default as long as a call may take, or with `drain` without
                limit. A call that does not return by then keeps its thread and its device; its items fail.
        """
        with self._closing:
            if self._closed:
                return
            self._state.close(drain=drain)
            if wait is None and not drain:
                wait = self._deadline
            until = None if wait is None else time.monotonic() + wait
            with ExitStack() as stack:
                stack.callback(self._end)
                for encoder, threads in self._threads.items():
                    stack.callback(_close_chain, encoder, threads)
                for thread in chain(*self._threads.values()):
                    thread.join(None if until is None else max(0.0, until - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        self._state.abandon()
        self._closed = True

    def _threads_of(self, encoder: GuardedEncoder) -> list[threading.Thread]:
        """Make one thread for each call that the device can have in progress."""
        capabilities = encoder.primary.capabilities
        calls = max(1, capabilities.max_in_flight) if capabilities.thread_safe else 1
        names = [f"visionaccel-{capabilities.device}-{call}" for call in range(calls)]
        return [threading.Thread(target=self._run, args=(encoder,), name=name, daemon=True) for name in names]

    def _item(
        self, patches: Array, grid: GridLike, key: str | None, arrival: float | None, urgent: bool = False
    ) -> Item:
        (checked,) = as_grids([grid], self.tower.merge_size)
        if len(patches) != checked.patches:
            raise PatchesError(
                f"{len(patches)} patches were given, but grid {checked} has {checked.patches}.", hint=_MISMATCH
            )
        try:
            context = f"{dtype_name(patches)} {self._numerics}"  # what else decides the embedding's values
            own_key = item_key(patches, checked, context) if key is None else f"{key} {checked} {context}"
        except Exception as error:
            raise PatchesError(
                f"the patches cannot be read: {type(error).__name__}: {error}.",
                hint="Pass pixel_values as the model's own processor returns them.",
            ) from error
        return Item(own_key, patches, checked, time.monotonic() if arrival is None else arrival, urgent)

    def _split(self, patches: Array, grids: Iterable[GridLike]) -> list[tuple[Array, Grid]]:
        checked = as_grids(grids, self.tower.merge_size)
        total = total_patches(checked)
        if total != len(patches):
            raise PatchesError(f"{len(patches)} patches were given, but the grids describe {total}.", hint=_MISMATCH)
        return list(zip(split_rows(patches, [grid.patches for grid in checked]), checked, strict=True))

    # On a device's threads:

    def _run(self, encoder: GuardedEncoder) -> None:
        while (item := self._state.take(partial(self._least_wait, encoder))) is not None:
            started = time.monotonic()
            answer = self._encode(encoder, item, started - item.submitted)
            self._state.finish(item, answer, time.monotonic() - started)

    def _least_wait(self, encoder: GuardedEncoder) -> float:
        """Return how long an item must wait before a chain takes it, to answer it or, if all hang, to fail it."""
        if encoder.stuck_for == 0:
            return 0.0
        return self._deadline if min(each.stuck_for for each in self.encoders) >= self._deadline else math.inf

    def _encode(self, encoder: GuardedEncoder, item: Item, waited: float) -> Embedded | VisionAccelError:
        """Return an item's answer. Retries if wrong answers were found during the call."""
        patches = item.patches
        try:
            for _ in range(_TRIES):
                generation = self.cache.generation
                (answer,) = encoder.encode_items(patches, [item.grid], waited)
                if isinstance(answer, VisionAccelError):
                    return answer
                rows = np.asarray(as_numpy(answer.rows), dtype=self._dtype, order="C")
                rows.flags.writeable = False
                if answer.fallback or self.cache.put(item.key, rows, generation):
                    return Embedded(rows, answer.fallback)
            message = f"a device was found to give wrong answers during each of {_TRIES} tries."
            return DeviceError(message, hint="Try again later; see the log.")
        except Exception as error:  # The thread must survive any exception; the item fails with it.
            logger.exception("Unexpected error while encoding.")
            return DeviceError(f"encoding failed with {type(error).__name__}: {error}")


def _close_chain(encoder: GuardedEncoder, threads: Sequence[threading.Thread]) -> None:
    """Close a chain's encoders. A call that is still in progress keeps its encoder until it returns."""
    alive = any(thread.is_alive() for thread in threads)
    encoder.close(0.0 if alive else _CLOSING)
