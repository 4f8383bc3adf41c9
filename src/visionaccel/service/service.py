"""The encode service: a bounded queue in front of one encoder for each device, with futures for answers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from visionaccel.core.arrays import Array
from visionaccel.core.dtypes import FLOATS
from visionaccel.core.grid import Grid, GridLike, as_grids, total_patches
from visionaccel.errors import (
    ConfigurationError,
    DeadlineError,
    DeviceLostError,
    PatchesError,
    QueueFullError,
    VisionAccelError,
)
from visionaccel.service.alarms import Alarms
from visionaccel.service.cache import EmbeddingCache
from visionaccel.service.devices import DeviceThreads
from visionaccel.service.keys import embedding_key, numerics
from visionaccel.service.ledger import Ledger, ServiceCounters
from visionaccel.service.queue import Embedding, Item
from visionaccel.trust import GuardedEncoder

__all__ = ["EncodeService"]

_MISMATCH = "Pass the pixel_values and the grid_thw of the same processor call."


class EncodeService:
    """Encodes images and videos in the order of their arrival, on whichever device is free.

    Safe to use from any thread; use as a context manager or call `close`. An item that fails, fails alone. Equal items
    that are in the service at one time are encoded once, and embeddings are kept in a cache. A device's backend says
    how many calls it wants in progress at a time, and whether small items should share one
    (`Capabilities.max_in_flight`, `batch_patches`).

    A call of a device has its encoder's deadline. The items of one that does not return in time get the next encoder of
    the chain; where there is none, an item that the call was for alone fails with DeadlineError, and others get a call
    each once the encoder works again. What waits then waits for that, too, but for no longer than the deadline.

    Args:
        encoders: One for each device, which the service closes. All must compute the same numbers.
        queue_size: Most items that wait for a device.
        cache: Where embeddings are kept: a number of bytes for a cache of its own, or one that is shared.
        dtype: Dtype of the embeddings: `float32`, `bfloat16` (through ml_dtypes) or `float16`.

    Raises:
        ConfigurationError: If there is no encoder, or they differ in what they compute.
    """

    def __init__(
        self,
        encoders: Sequence[GuardedEncoder],
        *,
        queue_size: int = 64,
        cache: int | EmbeddingCache = 512 * 2**20,
        dtype: str = "float32",
    ) -> None:
        self._numbers = _one_numerics(encoders, dtype)
        self.tower = encoders[0].primary.tower
        self.cache = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache)
        self._dtype = dtype
        self._deadline = max(stage.deadline for encoder in encoders for stage in encoder.stages)
        self._ledger = Ledger(queue_size)
        self._alarms = Alarms("visionaccel-deadlines")
        self._devices = [
            DeviceThreads(encoder, self._ledger, self.cache, dtype, self._one_is_stuck) for encoder in encoders
        ]
        for stage in {stage for encoder in encoders for stage in encoder.stages}:
            stage.on_drift(self.cache.clear)
        self._closing = threading.Lock()
        self._closed = self._ended = False
        self._intake = threading.Thread(target=self._take_in, name="visionaccel-intake", daemon=True)
        self._intake.start()
        for device in self._devices:
            device.start()

    @property
    def counters(self) -> ServiceCounters:
        """What it has done so far."""
        return self._ledger.counters

    @property
    def closed(self) -> bool:
        """Whether it was closed, and every future is answered."""
        return self._ended

    @property
    def room(self) -> bool:
        """Whether an item would be taken in at once."""
        return self._ledger.room

    @property
    def encoders(self) -> tuple[GuardedEncoder, ...]:
        """The encoder of each device."""
        return tuple(device.encoder for device in self._devices)

    def bytes_of(self, grid: Grid) -> int:
        """Bytes of the embedding of an item of that grid."""
        itemsize: int = np.dtype(FLOATS[self._dtype]).itemsize
        return grid.tokens(self.tower.merge_size) * self.tower.out_width * itemsize

    def submit(
        self,
        patches: Array,
        grid: GridLike,
        *,
        arrival: float | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
    ) -> Future[Embedding]:
        """Have one image or video encoded.

        Takes microseconds where there is room: patches are looked at on another thread.

        Args:
            patches: float32, float16 or bfloat16 [P, patch_width], numpy or torch. Must not change until it is encoded.
            grid: Its (t, h, w).
            arrival: When it arrived, if not now; earlier ones are encoded first. On the clock of `time.monotonic`,
                unless every caller of the service uses another one.
            timeout: Seconds to wait for room in the queue; None for as long as it takes.
            deadline: Seconds from now until it must be encoded; None for no limit besides the service's.

        Returns:
            A future of the embedding, [tokens, out_width] in the service's dtype, read-only and shared with others that
            ask for the same. Cancel it if it is not wanted any more: an item that nobody wants is not encoded. It fails
            with the item's own error: InputError for wrong data, DeadlineError, another DeviceError, or
            ServiceClosedError.

        Raises:
            GridError: If the grid is wrong.
            PatchesError: If there are more or fewer patches than it says.
            QueueFullError: If there was no room in time.
            ServiceClosedError: If the service is closed.
        """
        item = self._item(patches, grid, arrival)
        if not self._ledger.slot():
            if timeout is not None and timeout <= 0:
                raise _full(timeout)
            turn = self._ledger.turn()
            try:
                turn.result(timeout)
            except BaseException as error:
                self._ledger.give_back(turn)
                if isinstance(error, TimeoutError):
                    raise _full(timeout) from None
                raise
        return self._enter(item, deadline)

    async def submit_async(
        self, patches: Array, grid: GridLike, *, arrival: float | None = None, deadline: float | None = None
    ) -> Embedding:
        """`submit` without blocking the event loop, and the answer. Cancelling the task cancels the item.

        Raises:
            VisionAccelError: What `submit` raises, and the item's own error.
        """
        item = self._item(patches, grid, arrival)
        if not self._ledger.slot():
            turn = self._ledger.turn()
            try:
                await asyncio.wrap_future(turn)
            except asyncio.CancelledError:
                self._ledger.give_back(turn)
                raise
        return await asyncio.wrap_future(self._enter(item, deadline))

    def encode(self, patches: Array, grids: Iterable[GridLike], *, deadline: float | None = None) -> list[Embedding]:
        """Encode several images and videos and wait for all of them.

        Args:
            patches: [P, patch_width] of all items, one after the other.
            grids: (t, h, w) of each item.
            deadline: Seconds from its submission until each must be encoded.

        Returns:
            One embedding for each grid, as the future of `submit`.

        Raises:
            VisionAccelError: The error of the first item that failed; those that still wait are cancelled.
        """
        futures: list[Future[Embedding]] = []
        try:
            for rows, grid in self._split(patches, grids):
                futures.append(self.submit(rows, grid, deadline=deadline))
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    async def encode_async(
        self, patches: Array, grids: Iterable[GridLike], *, deadline: float | None = None
    ) -> list[Embedding]:
        """As `encode`, without blocking the event loop."""
        items = self._split(patches, grids)
        tasks = [asyncio.create_task(self.submit_async(rows, grid, deadline=deadline)) for rows, grid in items]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self, *, drain: bool = False, wait: float | None = None) -> None:
        """Take in nothing more, answer every future, give back the devices and end every thread.

        Args:
            drain: Encode what waits first; otherwise it fails with ServiceClosedError. What a device is encoding is
                finished in either case.
            wait: Seconds to wait for that; by default as long as a call may take, or with `drain` without limit. A call
                that does not return by then keeps its thread and its device until the process ends; its items fail.
        """
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._ledger.close(drain=drain)
            if wait is None and not drain:
                wait = self._deadline
            until = None if wait is None else time.monotonic() + wait
            self._intake.join()
            with ExitStack() as stack:
                stack.callback(self._end)
                stack.callback(self._alarms.close)
                stack.callback(self._ledger.abandon)
                for device in self._devices:
                    stack.callback(device.close)
                for device in self._devices:
                    stack.callback(device.join, until)

    def _end(self) -> None:
        self._ended = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _item(self, patches: Array, grid: GridLike, arrival: float | None) -> Item:
        (checked,) = as_grids([grid], self.tower.merge_size)
        if len(patches) != checked.patches:
            raise PatchesError(
                f"{len(patches)} patches were given, but grid {checked} has {checked.patches}.", hint=_MISMATCH
            )
        now = time.monotonic()
        return Item(patches, checked, now if arrival is None else arrival, now)

    def _split(self, patches: Array, grids: Iterable[GridLike]) -> list[tuple[Array, Grid]]:
        checked = as_grids(grids, self.tower.merge_size)
        total = total_patches(checked)
        if total != len(patches):
            raise PatchesError(f"{len(patches)} patches were given, but the grids describe {total}.", hint=_MISMATCH)
        ends = np.cumsum([grid.patches for grid in checked]).tolist()
        return [(patches[start:end], grid) for start, end, grid in zip([0, *ends], ends, checked, strict=False)]

    def _enter(self, item: Item, deadline: float | None) -> Future[Embedding]:
        future = self._ledger.enter(item)
        if deadline is not None:
            error = DeadlineError(
                f"the item was not encoded within {deadline:g} s of its submission.", hint="Try again."
            )
            alarm = self._alarms.set(deadline, partial(self._ledger.expire, future, error))
            future.add_done_callback(lambda _: self._alarms.forget(alarm))
        return future

    def _take_in(self) -> None:
        """Give each item its key, and answer it if its embedding is known."""
        while (item := self._ledger.incoming()) is not None:
            key: str | None = None
            known: Embedding | VisionAccelError | None = None
            try:
                key = embedding_key(item.patches, item.grid, self._numbers)
                known = self.cache.get(key)
            except Exception as error:
                known = PatchesError(
                    f"the patches cannot be read: {type(error).__name__}: {error}.",
                    hint="Pass pixel_values as the model's own processor returns them.",
                )
            self._ledger.place(item, key, known)

    def _one_is_stuck(self) -> None:
        self._alarms.set(self._deadline, self._fail_waiting_if_all_are_stuck)

    def _fail_waiting_if_all_are_stuck(self) -> None:
        """While no device takes anything, what waits does not wait for ever; what has just come gets its time, too."""
        if min(device.stuck_for() for device in self._devices) >= self._deadline:
            error = DeviceLostError(
                f"no device has taken an item for {self._deadline:g} s: all are past their deadline.",
                hint="Restart the server. VISIONACCEL_ISOLATION=process ends and restarts a device that hangs.",
            )
            self._ledger.fail_waiting(self._deadline, error)
            self._one_is_stuck()


def _one_numerics(encoders: Sequence[GuardedEncoder], dtype: str) -> str:
    """What all encoders compute.

    Raises:
        ConfigurationError: If that is not one thing.
    """
    if not encoders:
        raise ConfigurationError("an encode service needs an encoder.", hint="Open one with open_encoder.")
    if dtype not in FLOATS:
        raise ConfigurationError(f"embeddings cannot be {dtype}.", hint=f"Name one of: {', '.join(FLOATS)}.")
    first = numerics(encoders[0].primary, dtype)
    if any(numerics(encoder.primary, dtype) != first for encoder in encoders[1:]):
        raise ConfigurationError(
            "all devices of an encode service must run the same programs, with one backend, precision and options.",
            hint="Open a service for each kind of device.",
        )
    return first


def _full(timeout: float | None) -> QueueFullError:
    return QueueFullError(
        f"the queue of the encode service is full{f' since {timeout:g} s' if timeout else ''}.",
        hint="Try again later, or raise VISIONACCEL_QUEUE_SIZE.",
    )
