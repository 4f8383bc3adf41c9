"""The threads that keep one encoder of a service busy, and what becomes of calls that do not return."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from visionaccel.arrays import FLOATS, Array, as_numpy, is_tensor
from visionaccel.errors import DeadlineError, DeviceError, VisionAccelError
from visionaccel.isolation import IsolatedSession
from visionaccel.runtime.alarms import Alarms
from visionaccel.runtime.embedding_cache import EmbeddingCache
from visionaccel.runtime.guarded import Embedded, GuardedEncoder
from visionaccel.runtime.ledger import Ledger
from visionaccel.runtime.queue import Embedding, Item
from visionaccel.safe_text import safe_logger

__all__ = ["DeviceThreads"]

logger = safe_logger(__name__)

_TRIES = 3
_CLOSING = 1.0


class DeviceThreads:
    """Takes items from the ledger, as many at a time as the backend declares, until there are none any more.

    Args:
        encoder: The encoder of one device.
        ledger: Where items come from and go to.
        cache: Where embeddings are kept.
        alarms: Watches the deadline of each call.
        deadline: Seconds that a call may take. Not for a device in a child process, which is ended by a limit of its
            own: what comes then, a restart and a fallback, may take its time.
        dtype: Dtype of the embeddings.
        stuck: Called, from another thread, when a call is past its deadline.
    """

    def __init__(
        self,
        encoder: GuardedEncoder,
        ledger: Ledger,
        cache: EmbeddingCache,
        alarms: Alarms,
        deadline: float,
        dtype: str,
        stuck: Callable[[], None],
    ) -> None:
        self.encoder = encoder
        self._ledger, self._cache, self._alarms = ledger, cache, alarms
        self._deadline, self._dtype, self._on_stuck = deadline, dtype, stuck
        capabilities = encoder.primary.capabilities
        self._device, self._most_patches = capabilities.device, capabilities.batch_patches
        self._isolated = all(isinstance(opened.session, IsolatedSession) for opened in encoder.primary.programs)
        self._lock = threading.Lock()
        self._calls: dict[int, list[Item]] = {}
        self._late: set[int] = set()
        self._stuck_since: float | None = None
        calls = max(1, capabilities.max_in_flight) if capabilities.thread_safe else 1
        self._most_calls, self._numbers = calls, itertools.count()
        self._replaced: set[int] = set()
        self._threads: list[threading.Thread] = []

    def stuck_for(self) -> float:
        """Seconds since every call that the device may have in progress is past its deadline; 0 if one is not."""
        since = self._stuck_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        """Start the threads."""
        with self._lock:
            for _ in range(self._most_calls):
                self._start_one()

    def join(self, until: float | None) -> None:
        """Wait until the threads have ended; one that is in a call after that time is left to it.

        Args:
            until: On the monotonic clock; None for as long as it takes.
        """
        for thread in self._threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))

    def close(self) -> None:
        """Close the encoders of the chain. A call that is still in progress keeps its own until it returns."""
        alive = any(thread.is_alive() for thread in self._threads)
        if alive:
            logger.warning("A call of device %r does not return; it keeps the device and a thread.", self._device)
        self.encoder.close(0.0 if alive else _CLOSING)

    def _run(self, call: int) -> None:
        while items := self._ledger.take(self._most_patches):
            with self._lock:
                self._calls[call] = items
            alarm = None
            if not self._isolated:
                alarm = self._alarms.set(self._deadline, partial(self._overdue, call, items, threading.get_ident()))
            started = time.monotonic()
            waited = max(0.0, started - min(item.submitted for item in items))
            answers, results = self._trusted(items, waited)
            seconds = time.monotonic() - started
            if alarm is not None:
                self._alarms.forget(alarm)
            with self._lock:
                del self._calls[call]
                self._late.discard(call)
                self._stuck_since = None
                replaced = call in self._replaced
            embedded = [answer for answer in answers if isinstance(answer, Embedded)]
            fallback = sum(answer.fallback for answer in embedded)
            self._ledger.finish(items, results, encoded=len(embedded), fallback=fallback, busy_seconds=seconds)
            if replaced:
                return

    def _trusted(
        self, items: Sequence[Item], waited: float
    ) -> tuple[list[Embedded | VisionAccelError], list[Embedding | VisionAccelError]]:
        """Answers, and what the service hands out, of no device that turned out meanwhile to answer wrongly."""
        for _ in range(_TRIES):
            generation = self._cache.generation
            answers = self._encode(items, waited)
            results = [
                self._keep(item, answer, len(items), generation) for item, answer in zip(items, answers, strict=True)
            ]
            devices = any(isinstance(answer, Embedded) and not answer.fallback for answer in answers)
            if generation == self._cache.generation or not devices:
                break
        return answers, results

    def _encode(self, items: Sequence[Item], waited: float) -> list[Embedded | VisionAccelError]:
        try:
            patches = _joined([item.patches for item in items])
            return self.encoder.encode_items(patches, [item.grid for item in items], waited)
        except Exception as error:  # The thread must survive what was not foreseen; its items answer for it.
            logger.exception("Encoding failed in a way that it should not.")
            return [DeviceError(f"encoding failed with {type(error).__name__}: {error}")] * len(items)

    def _keep(
        self, item: Item, answer: Embedded | VisionAccelError, together: int, generation: int
    ) -> Embedding | VisionAccelError:
        """The embedding as the service hands it out, kept in the cache if it has the numbers that its key says."""
        if isinstance(answer, VisionAccelError):
            return answer
        try:
            # A view of what several items were encoded into would keep all of it in memory.
            rows = np.array(
                as_numpy(answer.rows), dtype=FLOATS[self._dtype], order="C", copy=True if together > 1 else None
            )
        except Exception as error:
            return DeviceError(f"the embeddings cannot be kept: {type(error).__name__}: {error}")
        rows.flags.writeable = False
        if item.key is not None and not answer.fallback:
            self._cache.put(item.key, rows, generation)
        return rows

    def _start_one(self) -> None:
        call = next(self._numbers)
        name = f"visionaccel-{self._device}-{call}"
        self._threads.append(threading.Thread(target=self._run, args=(call,), name=name, daemon=True))
        self._threads[-1].start()

    def _overdue(self, call: int, items: list[Item], thread: int) -> None:
        """A call is late. Where another encoder can take over, it gets the items, on another thread."""
        error = DeadlineError(
            f"device {self._device!r} did not answer within {self._deadline:g} s.",
            hint="Raise VISIONACCEL_DEADLINE, or set VISIONACCEL_ISOLATION=process, which ends a device that hangs.",
        )
        if self._calls.get(call) is not items:
            return
        # Tells observers, so without the lock. Should the call return at this moment, one that works is probed.
        leave = self.encoder.leave_hung(thread, error.message, [item.grid for item in items])
        leave = leave and not self._ledger.closed
        with self._lock:
            if self._calls.get(call) is not items:
                return
            if leave:
                self._replaced.add(call)
            else:
                self._late.add(call)
            if len(self._late) == self._most_calls:
                self._stuck_since = time.monotonic()
        logger.error("%s", error)
        if leave:
            self._ledger.again(items)
            with self._lock:
                self._start_one()
            return
        self._ledger.overdue(items, error)
        self._on_stuck()


def _joined(patches: Sequence[Array]) -> Array:
    """The patches of several items as one array."""
    if len(patches) == 1:
        return patches[0]
    if all(is_tensor(each) for each in patches):
        import torch

        return torch.cat(list(patches))
    return np.concatenate([as_numpy(each) for each in patches])
