"""A session whose calls take a configured time and sleep for most of it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
from cachetools import LRUCache, cached

from visionaccel.backends import Capabilities, Session
from visionaccel.core.arrays import Array, as_numpy, is_tensor
from visionaccel.core.program import Program
from visionaccel.core.safe_text import safe_logger
from visionaccel_testing.simulated.faults import FaultRule, FaultScript
from visionaccel_testing.simulated.latency import Frame, Latency, frames_of

logger = safe_logger(__name__)

OVERRUN = "times that are measured with it are too long"
"""Logged if a device's computation took longer than its configured time."""

_MOST_REMEMBERED_BYTES = 512 * 2**20


class SimulatedSession(Session):
    """Runs a wrapped session and sleeps for the rest of the call's time. Safe to use from several threads.

    It is one device: calls beyond `capabilities.max_in_flight` wait, and their time starts when they are let in. A
    wrapped session that is not thread-safe computes one call at a time while others sleep.

    With `replay`, answers are remembered by their inputs; the least recently used are forgotten.

    Attributes:
        calls: Calls so far.
        overruns: Calls so far whose computation took longer than the configured time.
    """

    def __init__(
        self,
        inner: Session,
        capabilities: Capabilities,
        program: Program,
        latency: Latency,
        script: FaultScript,
        *,
        replay: bool = False,
    ) -> None:
        self.capabilities = capabilities
        self._inner, self._program, self._latency, self._script = inner, program, latency, script
        self._replay = replay
        remembered: LRUCache[bytes, Mapping[str, Array]] = LRUCache(_MOST_REMEMBERED_BYTES, getsizeof=_bytes)
        self._remembered = cached(remembered, key=_digest, lock=threading.Lock())(self._computed)
        self._places = threading.BoundedSemaphore(capabilities.max_in_flight)
        self._turn = nullcontext() if inner.capabilities.thread_safe else threading.Lock()
        self._counting = threading.Lock()
        self.calls = 0
        self.overruns = 0

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with self._places:
            started = time.monotonic()
            with self._counting:
                self.calls += 1
                call = self.calls
            frames = frames_of(self._program, inputs)
            seconds = self._latency.seconds(frames)
            fault = self._script.fault(call, frames)
            if fault is not None:
                fault[0].happen(call)
            answer = _copied(self._remembered(inputs)) if self._replay else self._computed(inputs)
            if fault is not None:
                answer = _spoilt(answer, *fault, frames)
            self._sleep_until(started + seconds, seconds)
            return answer

    def begin_close(self) -> None:
        self._inner.begin_close()

    def close(self) -> None:
        self._inner.close()

    def _computed(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with self._turn:
            return self._inner.run(inputs)

    def _sleep_until(self, end: float, seconds: float) -> None:
        """Sleep until `end`. A late call with a configured time is counted, and the first one is logged."""
        left = end - time.monotonic()
        if left > 0:
            time.sleep(left)
        elif seconds > 0:
            with self._counting:
                self.overruns += 1
                first = self.overruns == 1
            if first:
                logger.warning(
                    "A call of simulated device %s is configured to take %.3f s, but computed for %.3f s: %s. Further "
                    "such calls are not logged.",
                    self.capabilities.device,
                    seconds,
                    seconds - left,
                    OVERRUN,
                )


def _spoilt(
    answer: Mapping[str, Array], rule: FaultRule, hits: Sequence[bool], frames: Sequence[Frame]
) -> Mapping[str, Array]:
    """Return a copy of an answer in which a rule has overwritten the rows of the frames that it hits."""
    spoilt = _copied(answer)
    ends = np.cumsum([0, *(frame.patches for frame in frames)]).tolist()
    for array in spoilt.values():
        if all(hits):
            rule.spoil(array)  # padding too
            continue
        rows = len(array)
        for (start, end), hit in zip(pairwise(ends), hits, strict=True):
            if hit:
                rule.spoil(array[start * rows // ends[-1] : end * rows // ends[-1]])
    return spoilt


def _copied(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return copies of numpy arrays or torch tensors."""
    return {name: array.clone() if is_tensor(array) else np.array(array) for name, array in arrays.items()}


def _digest(inputs: Mapping[str, Array]) -> bytes:
    """Return a digest of the inputs of a call: their names, devices, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(inputs.items()):
        place = str(array.device) if is_tensor(array) else "numpy"
        digest.update(repr((name, place, str(array.dtype), tuple(array.shape))).encode())
        digest.update(np.ascontiguousarray(as_numpy(array)).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _bytes(arrays: Mapping[str, Array]) -> int:
    return sum(int(array.nbytes) for array in arrays.values())
