"""The cache of embeddings, and its keys.

The cache never holds more bytes than its size, nor an embedding whose computation began before it was cleared.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import suppress
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.grid import Grid
from visionaccel.core.program import Program
from visionaccel.encoder import Encoder


class EmbeddingCache:
    """Keeps the most recently used embeddings in host memory. Safe to share between threads and services.

    Returned embeddings are read-only and shared by all callers.

    Args:
        size: The maximum total of the embeddings, in bytes.

    Attributes:
        evicted: How many embeddings made room for others, or were too large to be kept.
        generation: How often the cache was cleared.
    """

    def __init__(self, size: int) -> None:
        self.evicted = self.generation = 0
        self._entries: LRUCache[str, NDArray[Any]] = LRUCache(size, getsizeof=lambda embedding: embedding.nbytes)
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes of embeddings in the cache."""
        return int(self._entries.currsize)

    def get(self, key: str) -> NDArray[Any] | None:
        """Return the embedding of a key, or None."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: str, embedding: NDArray[Any], generation: int | None = None) -> bool:
        """Keep an embedding [tokens, width], which becomes read-only; the caller must not write to it any more.

        Returns:
            False if the cache was cleared since the generation in which the computation began: nothing is kept then.
        """
        embedding.flags.writeable = False
        with self._lock:
            if generation not in (None, self.generation):
                return False
            self._entries.pop(key, None)  # cachetools 5 would make room for the whole replacement
            entries = len(self._entries)
            with suppress(ValueError):  # too large
                self._entries[key] = embedding
            self.evicted += entries + 1 - len(self._entries)
            return True

    def clear(self) -> None:
        """Remove all embeddings and begin a new generation."""
        with self._lock:
            self.generation += 1
            self._entries.clear()


def item_key(patches: Array, grid: Grid, context: str = "") -> str:
    """Return a digest of an item's patches, its grid and a context, equal in every process. Releases the GIL."""
    digest = hashlib.blake2b(repr((*grid.thw, context)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(as_numpy(patches)).view(np.uint8).data)
    return digest.hexdigest()


def numerics(encoder: Encoder, dtype: str) -> str:
    """Return a digest of everything that decides the embeddings' values: device, options, programs and dtype.

    A program without a digest is identified by the files of its weights and their states when they were verified.
    """
    capabilities = encoder.capabilities
    parts = {
        "family": encoder.tower.family,
        "backend": encoder.backend,
        "device": re.sub(r"[:@]\d+$", "", capabilities.device),  # the kind
        "hardware": sorted({opened.session.capabilities.hardware for opened in encoder.programs}),
        "precision": capabilities.precision,
        "options": encoder.options,
        "dtype": dtype,
        "programs": sorted(_identity(opened.program) for opened in encoder.programs),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _identity(program: Program) -> str:
    if program.digest is not None:
        return program.digest
    files = sorted({f"{weight.file} {weight.origin}" for weight in program.weights.values()})
    return f"{program.name} {program.format} {program.precision} {program.coverage} {files}"
