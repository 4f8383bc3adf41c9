"""Embeddings of images that were seen before, in the host's memory, bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from numpy.typing import NDArray

__all__ = ["EmbeddingCache"]


class EmbeddingCache:
    """Keeps the embeddings that were used last. Safe to share between threads and services.

    What it hands out is read-only and shared by everybody who asks for it.

    Args:
        size: Most bytes of embeddings that it keeps; 0 for none.

    Attributes:
        generation: How often everything was forgotten.
        hits: Questions that it could answer.
        evicted: Embeddings that made room for others, or were too large to be kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.generation = 0
        self.hits = 0
        self.evicted = 0
        self._held = 0
        self._entries: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes that it keeps now."""
        return self._held

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> NDArray[Any] | None:
        """The embedding kept under a key (see `visionaccel.service.keys`), or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                self.hits += 1
            return found

    def put(self, key: str, embedding: NDArray[Any], generation: int | None = None) -> None:
        """Keep an embedding.

        Args:
            key: Its key.
            embedding: [tokens, width]; it must not be written to from now on.
            generation: The generation in which it began to be computed: if everything was forgotten since, so is this.
        """
        embedding.flags.writeable = False
        with self._lock:
            if generation not in (None, self.generation):
                return
            self._held -= getattr(self._entries.pop(key, None), "nbytes", 0)
            self._entries[key] = embedding
            self._held += embedding.nbytes
            while self._held > self.size:
                _, oldest = self._entries.popitem(last=False)
                self._held -= oldest.nbytes
                self.evicted += 1

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self.generation += 1
            self._entries.clear()
            self._held = 0
