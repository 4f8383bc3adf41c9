"""The threads that keep one encoder of a service busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from visionaccel.core.arrays import Array, as_numpy, is_tensor
from visionaccel.core.dtypes import FLOATS
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import DeadlineError, DeviceError, VisionAccelError
from visionaccel.service.cache import EmbeddingCache
from visionaccel.service.ledger import Ledger
from visionaccel.service.queue import Embedding, Item
from visionaccel.trust import Embedded, GuardedEncoder

__all__ = ["DeviceThreads"]

logger = safe_logger(__name__)

_TRIES = 3
_PERIOD = 0.02
_CLOSING = 1.0


class DeviceThreads:
    """Takes items from the ledger, as many at a time as the backend declares, until there are none any more.

    Args:
        encoder: The encoder of one device.
        ledger: Where items come from and go to.
        cache: Where embeddings are kept.
        dtype: Dtype of the embeddings.
        stuck: Called when no encoder of the chain can answer because one hangs.
    """

    def __init__(
        self,
        encoder: GuardedEncoder,
        ledger: Ledger,
        cache: EmbeddingCache,
        dtype: str,
        stuck: Callable[[], None],
    ) -> None:
        self.encoder = encoder
        self._ledger, self._cache = ledger, cache
        self._dtype, self._on_stuck = dtype, stuck
        capabilities = encoder.primary.capabilities
        self._device, self._most_patches = capabilities.device, capabilities.batch_patches
        self._lock = threading.Lock()
        self._stuck_since: float | None = None
        calls = max(1, capabilities.max_in_flight) if capabilities.thread_safe else 1
        self._threads = [
            threading.Thread(target=self._run, name=f"visionaccel-{self._device}-{call}", daemon=True)
            for call in range(calls)
        ]

    def stuck_for(self) -> float:
        """Seconds since nothing of the chain can answer because an encoder hangs; 0 if something can."""
        since = self._stuck_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

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

    def _run(self) -> None:
        while self._wait_for_chain() and (items := self._ledger.take(self._most_patches)):
            if self.encoder.hangs and not self._ledger.closed:  # since this thread began to wait for items
                self._ledger.finish(items, [None] * len(items))
                continue
            started = time.monotonic()
            waited = max(0.0, started - min(item.submitted for item in items))
            answers, results = self._trusted(items, waited)
            seconds = time.monotonic() - started
            embedded = [answer for answer in answers if isinstance(answer, Embedded)]
            fallback = sum(answer.fallback for answer in embedded)
            # Which of several items a call hangs on is not known, so each gets a call of its own.
            ended = [None if len(items) > 1 and isinstance(result, DeadlineError) else result for result in results]
            self._ledger.finish(items, ended, encoded=len(embedded), fallback=fallback, busy_seconds=seconds)

    def _wait_for_chain(self) -> bool:
        """Take nothing while nothing can answer because an encoder hangs: what waits may be answered later."""
        while self.encoder.hangs and not self._ledger.closed:
            with self._lock:
                stuck, self._stuck_since = self._stuck_since, self._stuck_since or time.monotonic()
            if stuck is None:
                self._on_stuck()
            time.sleep(_PERIOD)
        self._stuck_since = None
        return True

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


def _joined(patches: Sequence[Array]) -> Array:
    """The patches of several items as one array."""
    if len(patches) == 1:
        return patches[0]
    if all(is_tensor(each) for each in patches):
        import torch

        return torch.cat(list(patches))
    return np.concatenate([as_numpy(each) for each in patches])
