"""Level 4: many threads, closing at any moment, forks, and no growth with use."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import numpy as np
import psutil

from visionaccel.backends import Registry
from visionaccel.encoder import Encoder, open_source
from visionaccel.errors import DeviceError
from visionaccel_testing.conformance.check import CheckFailedError, Checks, NotApplicableError, must_raise
from visionaccel_testing.conformance.fresh_process import in_fork, in_fresh_process
from visionaccel_testing.conformance.kit import (
    Embeddings,
    Kit,
    Subject,
    Weights,
    encoded,
    first_call,
    grids_of,
    listed,
    patches_for,
)
from visionaccel_testing.process_tree import memory, open_descriptors

LIFE_CYCLE = Checks(4)

_THREADS, _CALLS = 4, 12
_ROUNDS, _ENCODES, _OPENINGS = 4, 40, 6
_NOISE = 128 * 1024
"""Bytes that an allocator may keep in a round of encodes without a leak."""


@LIFE_CYCLE.add
def concurrent_calls(kit: Kit) -> None:
    """Each of many calls at once from different threads returns its own correct answer."""
    jobs = [(kit.calls[number % len(kit.calls)], 70 + number) for number in range(_CALLS)]
    alone = [kit.encode(kit.patches(grids, number), grids) for grids, number in jobs]
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in range(3):
            try:
                together = list(pool.map(lambda job: kit.encode(kit.patches(*job), job[0]), jobs))
            except DeviceError as error:
                raise CheckFailedError(
                    f"a call fails while other threads encode: {error} Calls share memory."
                ) from error
            for (grids, _number), found, exact in zip(jobs, together, alone, strict=True):
                kit.same(
                    found, exact,
                    f"grids {listed(grids)} while other threads encode (thread_safe="
                    f"{kit.encoder.capabilities.thread_safe}): calls share memory that they write to",
                )  # fmt: skip


@LIFE_CYCLE.add
def two_sessions(kit: Kit) -> None:
    """Two open encoders of different weights do not touch each other, and closing one leaves the other."""
    grids = kit.calls[0]
    patches = kit.patches(grids, 80)
    here = kit.encode(patches, grids)
    other = kit.subject_of("other", edit=_negate)
    with other.open() as second:
        there = encoded(second, patches, grids)
        exact = kit.expected(patches, grids, kit.reference_of(other.checkpoint))
        kit.compare(there, exact, "a second encoder with other weights, next to a first")
        kit.same(kit.encode(patches, grids), here, "an encoder next to a second one with other weights")
    kit.same(kit.encode(patches, grids), here, "an encoder after another one was closed")


@LIFE_CYCLE.add
def close_during_encode(kit: Kit) -> None:
    """Closing while threads encode lets calls finish, refuses later ones with DeviceError, and crashes nothing."""
    in_fresh_process(_close_during_encode, kit.subject)


@LIFE_CYCLE.add
def double_close(kit: Kit) -> None:
    """An encoder may be closed twice, refuses calls afterwards, and can be opened again."""
    grids = kit.calls[0]
    patches = kit.patches(grids)
    for _ in range(2):
        encoder = kit.subject.open()
        found = encoded(encoder, patches, grids)
        encoder.close()
        encoder.close()
        with must_raise(DeviceError, "an encode after `close` is answered."):
            encoder.encode(patches, grids)
        kit.same(kit.encode(patches, grids), found, "an encoder after another one on its files was closed twice")


@LIFE_CYCLE.add
def left_open(kit: Kit) -> None:
    """A process that exits with an open encoder exits normally."""
    in_fresh_process(_leave_open, kit.subject)


@LIFE_CYCLE.add
def fork(kit: Kit) -> None:
    """After a probe, a forked process can open and encode; forking a process with an encoder does not change it."""
    here, there = in_fresh_process(_fork, kit.subject)
    grids = kit.calls[0]
    exact = kit.encode(patches_for(grids, kit.seed), grids)
    kit.same(there, exact, "a process that was forked after a probe")
    kit.same(here, exact, "a process after a fork of it had ended")


@LIFE_CYCLE.add
def memory_slope(kit: Kit) -> None:
    """Memory does not grow with the number of encodes."""
    growths = in_fresh_process(_memory_growths, kit.subject)
    if min(growths) > _NOISE:
        kibibytes = ", ".join(f"{growth / 1024:.0f}" for growth in growths)
        raise CheckFailedError(
            f"memory grows in each of {_ROUNDS} rounds of {_ENCODES} encodes, by {kibibytes} KiB: each call leaks."
        )


@LIFE_CYCLE.add
def descriptors(kit: Kit) -> None:
    """Encodes and closed encoders leave no file descriptor and no thread."""
    before, after, by_encodes = in_fresh_process(_left_by_openings, kit.subject)
    if by_encodes >= _ENCODES // 4:
        raise CheckFailedError(
            f"{_ENCODES} encodes of one encoder left {by_encodes} file descriptors open in its processes."
        )
    for what, first, last in zip(("file descriptors", "threads"), before, after, strict=True):
        if last - first >= _OPENINGS // 2:
            raise CheckFailedError(
                f"{_OPENINGS} encoders that were opened, used and closed left {last - first} {what}; `close` must "
                "release everything that `open` acquired."
            )


def _negate(weights: Weights) -> None:
    weights.update({name: -weight for name, weight in weights.items() if weight.ndim > 1})


def _close_during_encode(subject: Subject) -> None:
    for pause in (0.0, 0.002, 0.02):
        encoder = subject.open()
        encode = first_call(encoder, subject.seed)
        exact = encode()
        pool = ThreadPoolExecutor(_THREADS)
        loops = [pool.submit(_encode_until_closed, encode, exact) for _ in range(_THREADS)]
        time.sleep(pause)
        encoder.close()
        if wait(loops, 60).not_done:
            raise CheckFailedError("calls in progress when the encoder was closed do not end.")
        for loop in loops:
            loop.result()


def _encode_until_closed(encode: Callable[[], Embeddings], exact: Embeddings) -> None:
    """Encode in a loop until a closed encoder raises DeviceError."""
    while True:
        try:
            found = encode()
        except DeviceError:
            return
        except BaseException as error:
            raise CheckFailedError(f"{type(error).__name__} instead of DeviceError: {error}") from error
        if not np.allclose(found, exact, rtol=1e-2, atol=1e-2 * float(np.abs(exact).max())):
            raise CheckFailedError("a call that was in progress when the encoder was closed got a wrong answer.")


def _leave_open(subject: Subject) -> None:
    encoder = subject.open()
    first_call(encoder, subject.seed)()
    _KEPT.append(encoder)


_KEPT: list[Encoder] = []
"""Keeps an encoder until the interpreter ends."""


def _fork(subject: Subject) -> tuple[Embeddings, Embeddings]:
    """Return the embeddings of this process after a fork, and of a process that was forked after a probe."""
    backend = Registry().load(subject.backend)
    for program in open_source(subject.source).programs(backend.formats_on(subject.device)):
        backend.probe(program, subject.device)

    def forked() -> Embeddings:
        with subject.open() as encoder:
            return first_call(encoder, subject.seed)()

    there = in_fork(forked)
    with subject.open() as encoder:
        encode = first_call(encoder, subject.seed)
        encode()
        in_fork(float)
        return encode(), there


def _memory_growths(subject: Subject) -> list[int]:
    """Return the growth of the resident memory of this process and its children in each round, in bytes."""
    with subject.open() as encoder:
        calls = [(grids, patches_for(grids, subject.seed)) for grids in grids_of(encoder)]

        def use() -> int:
            for number in range(_ENCODES):
                grids, patches = calls[number % len(calls)]
                encoder.encode(patches, grids)
            gc.collect()
            resident = memory().resident
            if resident is None:
                raise NotApplicableError("this system does not report how much memory a process has.")
            return resident

        use()
        sizes = [use() for _ in range(_ROUNDS + 1)]
    return [last - first for first, last in pairwise(sizes)]


def _left_by_openings(subject: Subject) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Return the file descriptors and threads of this process after one encoder, and after several more.

    The last number counts the descriptors that it and its children gain by many encodes of one encoder.
    """
    this = psutil.Process()

    def use(encodes: int = 0) -> tuple[tuple[int, int], int]:
        with subject.open() as encoder:
            encode = first_call(encoder, subject.seed)
            for _ in range(3):
                encode()
            few = open_descriptors()
            for _ in range(encodes):
                encode()
            more = open_descriptors() - few
        gc.collect()
        return (this.num_fds(), this.num_threads()), more

    use()
    before, _ = use()
    for _ in range(_OPENINGS):
        after, _ = use()
    _, by_encodes = use(_ENCODES)
    return before, after, by_encodes
