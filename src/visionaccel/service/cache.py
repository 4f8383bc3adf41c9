"""Embeddings of images that were seen before, in the host's memory, bounded in bytes."""

from __future__ import annotations

import threading
from typing import Any

from cachetools import LRUCache
from numpy.typing import NDArray


class EmbeddingCache:
    """Keeps the embeddings that were used last. Safe to share between threads and services.

    What it returns is read-only and shared by all callers.

    Args:
        size: Most bytes of embeddings that it keeps; 0 for none.

    Attributes:
        generation: How often everything was forgotten.
    """

    def __init__(self, size: int) -> None:
        self.generation = 0
        self._entries = _Entries(size)
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes that it keeps now."""
        return int(self._entries.currsize)

    @property
    def evicted(self) -> int:
        """Embeddings that made room for others, or were too large to be kept."""
        return self._entries.evicted

    def get(self, key: str) -> NDArray[Any] | None:
        """The embedding kept under a key (see `visionaccel.service.keys`), or None."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: str, embedding: NDArray[Any], generation: int | None = None) -> None:
        """Keep an embedding.

        Args:
            key: Its key.
            embedding: [tokens, width]; it must not be written to from now on.
            generation: The generation in which its computation began: if everything was forgotten since, so is this.
        """
        embedding.flags.writeable = False
        with self._lock:
            if generation not in (None, self.generation):
                return
            if embedding.nbytes > self._entries.maxsize:
                self._entries.evicted += 1
                return
            self._entries.pop(key, None)  # cachetools 5 makes room for all of what replaces an entry
            self._entries[key] = embedding

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self.generation += 1
            self._entries = _Entries(self._entries.maxsize, self._entries.evicted)


class _Entries(LRUCache[str, NDArray[Any]]):
    """Counts what leaves for other entries."""

    def __init__(self, size: float, evicted: int = 0) -> None:
        super().__init__(size, getsizeof=lambda embedding: embedding.nbytes)
        self.evicted = evicted

    def popitem(self) -> tuple[str, NDArray[Any]]:
        self.evicted += 1
        return super().popitem()
