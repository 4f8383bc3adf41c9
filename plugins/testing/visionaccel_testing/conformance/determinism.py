"""Level 3: the same images give the same embeddings, in any call, thread and process, next to any other images."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from visionaccel.core.grid import Grid
from visionaccel_testing.conformance.check import CheckFailedError, Checks
from visionaccel_testing.conformance.fresh_process import in_fresh_process
from visionaccel_testing.conformance.kit import Embeddings, Kit, Subject, encoded, listed, patches_for

DETERMINISM = Checks(3)

_CALLS = 5


@DETERMINISM.add
def calls(kit: Kit) -> None:
    """Repeated calls agree, with other calls between them."""
    for grids in kit.calls:
        patches = kit.patches(grids)
        first = kit.encode(patches, grids)
        for number in range(_CALLS):
            between = kit.calls[number % len(kit.calls)]
            kit.encode(kit.patches(between, 50 + number), between)
            kit.same(kit.encode(patches, grids), first, f"grids {listed(grids)}, encoded again")


@DETERMINISM.add
def processes(kit: Kit) -> None:
    """A newly started process gives the same embeddings."""
    found = in_fresh_process(_encode, kit.subject, kit.calls)
    for grids, embeddings in zip(kit.calls, found, strict=True):
        here = kit.encode(patches_for(grids, kit.seed), grids)
        kit.same(embeddings, here, f"grids {listed(grids)} in another process")


@DETERMINISM.add
def neighbours(kit: Kit) -> None:
    """An image's embeddings do not depend on the other images of its call."""
    for grids in kit.calls:
        image = grids[0]
        patches = kit.patches([image], 60)
        alone = kit.encode(patches, [image])
        for number, other in enumerate((image, grids[-1])):
            other_patches = 10.0 * kit.patches([other], 61 + number)
            both = kit.encode(np.concatenate([patches, other_patches]), [image, other])
            kit.compare(both[: len(alone)], alone, f"grid {image} alone and before one of {other} with larger values")
            both = kit.encode(np.concatenate([other_patches, patches]), [other, image])
            kit.compare(both[-len(alone) :], alone, f"grid {image} alone and after one of {other} with larger values")


@DETERMINISM.add
def threads(kit: Kit) -> None:
    """A thread that did not open the session gives the same embeddings."""
    grids = kit.calls[0]
    patches = kit.patches(grids)
    here = kit.encode(patches, grids)
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            try:
                there = pool.submit(kit.encode, patches, grids).result()
            except (Exception, SystemExit) as error:
                raise CheckFailedError(f"a thread that did not open the session cannot encode: {error}") from error
        kit.same(there, here, "the same patches in another thread")


def _encode(subject: Subject, calls_: Sequence[tuple[Grid, ...]]) -> list[Embeddings]:
    with subject.open() as encoder:
        return [encoded(encoder, patches_for(grids, subject.seed), grids) for grids in calls_]
