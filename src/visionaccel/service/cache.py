"""Embeddings of images that were seen before, and the keys that they are kept under."""

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

from visionaccel.core.arrays import Array, as_numpy, dtype_name
from visionaccel.core.grid import Grid
from visionaccel.core.program import Program
from visionaccel.encoder import Encoder


class EmbeddingCache:
    """Keeps the embeddings that were used last, in the host's memory. Safe to share between threads and services.

    What it returns is read-only and shared by all callers. It keeps at most `size` bytes of embeddings.

    Attributes:
        evicted: Embeddings that made room for others, or were too large to be kept.
        generation: How often everything was forgotten.
    """

    def __init__(self, size: int) -> None:
        self.evicted = self.generation = 0
        self._entries: LRUCache[str, NDArray[Any]] = LRUCache(size, getsizeof=lambda embedding: embedding.nbytes)
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes that it keeps now."""
        return int(self._entries.currsize)

    def get(self, key: str) -> NDArray[Any] | None:
        """The embedding kept under an `embedding_key`, or None."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: str, embedding: NDArray[Any], generation: int | None = None) -> None:
        """Keep an embedding [tokens, width], which must not be written to from now on.

        Not if everything was forgotten since the generation in which its computation began.
        """
        embedding.flags.writeable = False
        with self._lock:
            if generation not in (None, self.generation):
                return
            self._entries.pop(key, None)  # cachetools 5 makes room for all of what replaces an entry
            entries = len(self._entries)
            with suppress(ValueError):  # too large
                self._entries[key] = embedding
            self.evicted += entries + 1 - len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self.generation += 1
            self._entries.clear()


def item_key(patches: Array, grid: Grid, context: str = "") -> str:
    """A digest of an item's patches and grid, and of a context, the same in every process. Releases the GIL."""
    digest = hashlib.blake2b(repr((*grid.thw, context)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(as_numpy(patches)).view(np.uint8).data)
    return digest.hexdigest()


def embedding_key(patches: Array, grid: Grid, numbers: str, content: str | None = None) -> str:
    """What an item's embedding is kept under: its content, its grid, its dtype, and the encoder's `numerics`.

    The content is the caller's key of the patches' values, such as vLLM's hash; without it the patches are read.
    """
    context = f"{dtype_name(patches)} {numbers}"
    return item_key(patches, grid, context) if content is None else f"{content} {grid} {context}"


def numerics(encoder: Encoder, dtype: str) -> str:
    """A digest of what decides the numbers of embeddings in a dtype: the encoder's device, options and programs.

    A program without a digest is identified by its weights' files and their states when they were verified.
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
