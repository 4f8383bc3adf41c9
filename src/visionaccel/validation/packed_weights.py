"""Weights that a bundle holds itself, beside those they were packed from: equal bit by bit once rounded.

Comparing embeddings does not replace this: without a small bias they can differ by less than bfloat16 rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import FLOATS
from visionaccel.core.stored_tensor import CHUNK_BYTES, StoredTensor

__all__ = ["differing_weights"]

_MOST_ITEMS = CHUNK_BYTES
"""Elements read at once; both sides are read in equal numbers of them."""


def differing_weights(packed: Mapping[str, StoredTensor], source: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Names of weights that are only on one side, or are not the source's in the packed dtype, in order.

    Args:
        packed: The bundle's weights, by their names below the prefix.
        source: Those of the checkpoint that it was exported from, by the same names.

    Raises:
        CheckpointError: If a file cannot be read or ends too early.
    """
    names = sorted(set(packed) | set(source))
    return tuple(n for n in names if n not in packed or n not in source or not _same(packed[n], source[n]))


def _same(packed: StoredTensor, source: StoredTensor) -> bool:
    if packed.shape != source.shape:
        return False
    if packed.dtype == source.dtype:
        pairs = zip(_pieces(packed, np.uint8), _pieces(source, np.uint8), strict=True)
        return packed.length == source.length and all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    if packed.dtype not in FLOATS or source.dtype not in FLOATS:
        return False
    target = np.dtype(FLOATS[packed.dtype])
    for ours, theirs in zip(_pieces(packed, target), _pieces(source, FLOATS[source.dtype]), strict=True):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            # By way of float32, as it was packed.
            rounded = theirs.astype(np.float32, copy=False).astype(target, copy=False)
        if rounded.tobytes() != ours.tobytes():
            return False
    return True


def _pieces(tensor: StoredTensor, dtype: Any) -> Iterator[NDArray[Any]]:
    """The tensor's elements in order, one-dimensional, a fixed number at a time."""
    buffer = memoryview(bytearray(_MOST_ITEMS * np.dtype(dtype).itemsize))
    return (np.frombuffer(piece, dtype) for piece in tensor.chunks(buffer))
