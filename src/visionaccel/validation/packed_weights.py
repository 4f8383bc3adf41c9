"""Weights that a bundle holds itself, beside those they were packed from: equal bit by bit once rounded.

Comparing embeddings does not replace this: without a small bias they can differ by less than bfloat16 rounds.
"""

from __future__ import annotations

from collections.abc import Mapping

from visionaccel.core.dtypes import FLOATS
from visionaccel.core.stored_tensor import CHUNK_BYTES, StoredTensor, rounded

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
    if packed.dtype == source.dtype or packed.dtype not in FLOATS or source.dtype not in FLOATS:
        return packed.holds_the_same_as(source)
    pairs = zip(packed.elements(_MOST_ITEMS), source.elements(_MOST_ITEMS), strict=True)
    return all(rounded(theirs, packed.dtype).tobytes() == ours.tobytes() for ours, theirs in pairs)
