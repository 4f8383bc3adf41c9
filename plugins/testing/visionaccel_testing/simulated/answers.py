"""Answers that a simulated device gave before, so that the same input costs no computation again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from visionaccel.core.arrays import Array, as_numpy, is_tensor

__all__ = ["RememberedAnswers", "copied", "input_digest"]

_MOST_BYTES = 512 * 2**20


class RememberedAnswers:
    """Answers by their input's digest; those not used for longest are forgotten. Safe to use from several threads.

    Args:
        most_bytes: Most bytes of all answers. One that is larger is not kept.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most = most_bytes
        self._held = 0
        self._answers: OrderedDict[bytes, Mapping[str, Array]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> Mapping[str, Array] | None:
        """A copy of an answer, the caller's; None if it is not known."""
        with self._lock:
            answer = self._answers.get(digest)
            if answer is None:
                return None
            self._answers.move_to_end(digest)
        return copied(answer)

    def put(self, digest: bytes, answer: Mapping[str, Array]) -> None:
        """Keep a copy of an answer."""
        kept = copied(answer)
        with self._lock:
            self._held += _bytes(kept) - _bytes(self._answers.pop(digest, {}))
            self._answers[digest] = kept
            while self._held > self._most:
                _, oldest = self._answers.popitem(last=False)
                self._held -= _bytes(oldest)


def copied(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Copies of numpy arrays or torch tensors."""
    return {name: array.clone() if is_tensor(array) else np.array(array) for name, array in arrays.items()}


def input_digest(inputs: Mapping[str, Array]) -> bytes:
    """What identifies the inputs of a call: their names, kinds, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(inputs.items()):
        place = str(array.device) if is_tensor(array) else "numpy"
        digest.update(repr((name, place, str(array.dtype), tuple(array.shape))).encode())
        digest.update(np.ascontiguousarray(as_numpy(array)).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _bytes(arrays: Mapping[str, Array]) -> int:
    return sum(int(array.nbytes) for array in arrays.values())
