"""Level 1: the right rows for every grid and every mix of images, and arrays that are owned as the contract says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from visionaccel.backends import Session
from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.grid import Grid, total_patches
from visionaccel.core.program import Bucket
from visionaccel.encoder import Encoder
from visionaccel.errors import GridError, InputError, NonFiniteError, PatchesError
from visionaccel_testing.conformance.check import CheckFailedError, Checks, NotApplicableError
from visionaccel_testing.conformance.kit import PATCH_WIDTH, WINDOW_SIDE, Kit, listed

SHAPES = Checks(1)
Arrays: TypeAlias = Mapping[str, NDArray[Any]]


@SHAPES.add
def rows(kit: Kit) -> None:
    """Embeddings are float32 [sum of t*h*w / merge_size**2, out_width] for every list of grids."""
    tower = kit.encoder.tower

    @kit.holds(kit.grid_lists())
    def tried(grids: tuple[Grid, ...]) -> None:
        found = kit.encode(kit.patches(grids), grids)
        wanted = (total_patches(grids) // tower.merge_size**2, tower.out_width)
        if found.shape != wanted or found.dtype != np.float32:
            raise CheckFailedError(
                f"grids {listed(grids)}: {found.dtype}{list(found.shape)}, not float32{list(wanted)}."
            )


@SHAPES.add
def permutation(kit: Kit) -> None:
    """Images in another order give the same embeddings in that order."""
    merge = kit.encoder.tower.merge_size

    @kit.holds(kit.grid_lists(2, 4), st.randoms(use_true_random=False))
    def tried(grids: tuple[Grid, ...], random: Random) -> None:
        order = list(range(len(grids)))
        random.shuffle(order)
        patches = kit.patches(grids)
        pieces, outputs = _split(patches, grids), _split(kit.encode(patches, grids), grids, merge)
        shuffled = [grids[i] for i in order]
        found = kit.encode(np.concatenate([pieces[i] for i in order]), shuffled)
        kit.compare(
            found, np.concatenate([outputs[i] for i in order]),
            f"images of grids {listed(grids)} put into the order {order}: images of one call see each other, or come "
            "back in another order",
        )  # fmt: skip


@SHAPES.add
def addition(kit: Kit) -> None:
    """Encoding two lists of images together gives what encoding each gives."""

    @kit.holds(kit.grid_lists(1, 2), kit.grid_lists(1, 2))
    def tried(first: tuple[Grid, ...], second: tuple[Grid, ...]) -> None:
        one, two = kit.patches(first, 1), kit.patches(second, 2)
        together = kit.encode(np.concatenate([one, two]), [*first, *second])
        apart = np.concatenate([kit.encode(one, first), kit.encode(two, second)])
        kit.compare(
            together, apart,
            f"grids {listed(first)} and {listed(second)} in one call and in two: images of one call see each other",
        )  # fmt: skip


@SHAPES.add
def partial_windows(kit: Kit) -> None:
    """Windows at the right and lower edges, which have fewer patches, are as correct as whole ones."""
    partial = [call for call in kit.calls if any(grid.h % WINDOW_SIDE or grid.w % WINDOW_SIDE for grid in call)]
    if not partial:
        raise NotApplicableError("all grids that it takes consist of whole windows.")
    for grids in partial:
        kit.check(grids, f"grids {listed(grids)} of partial windows")


@SHAPES.add
def padding(kit: Kit) -> None:
    """The padding of a bucket does not change the image's embeddings."""
    found = False
    for frame in dict.fromkeys(grid.frame for call in kit.calls for grid in call):
        opened = kit.encoder.program_for(frame)
        coverage = opened.program.coverage
        if not isinstance(coverage, Bucket):
            continue
        found = True
        what = f"grid {frame} in a bucket of {coverage}"
        kit.check([frame], what)
        inputs = dict(opened.host.inputs(kit.patches([frame]), [frame]))
        clean = opened.session.run(inputs)
        name = opened.program.inputs[0].name  # patches, as they come or embedded by the host
        padded = np.array(inputs[name])
        padded[len(padded) * frame.patches // coverage.patches :] = 1000.0
        dirty = opened.session.run({**inputs, name: padded})
        there, here = (as_numpy(opened.host.embeddings(each, [frame])) for each in (dirty, clean))
        kit.compare(there, here, f"{what} whose unused patches are not zero: padding is not masked")
    if not found:
        raise NotApplicableError("it has no program for a bucket of grids.")


@SHAPES.add
def memory_layout(kit: Kit) -> None:
    """Patches that are read-only, not contiguous or of a shorter dtype give the same embeddings as their values."""
    grids = kit.calls[0]
    patches = kit.patches(grids)
    exact = kit.encode(patches, grids)
    frozen = patches.copy()
    frozen.flags.writeable = False
    wide = np.zeros((len(patches), 2 * PATCH_WIDTH), np.float32)
    wide[:, ::2] = patches
    layouts = {
        "read-only": frozen,
        "every other column of a wider array": wide[:, ::2],
        "in Fortran order": np.asfortranarray(patches),
        "rows in reverse": patches[::-1].copy()[::-1],
    }
    for name, given in layouts.items():
        kit.same(kit.encode(given, grids), exact, f"patches that are {name}")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        short = patches.astype(dtype)
        kit.same(
            kit.encode(short, grids), kit.encode(short.astype(np.float32), grids),
            f"patches of {np.dtype(dtype).name} and the same values in float32",
        )  # fmt: skip


@SHAPES.add
def inputs_untouched(kit: Kit) -> None:
    """A session writes to none of its inputs, and accepts read-only ones."""
    for grids in kit.calls:
        with _watched(kit.encoder) as seen:
            kit.encode(kit.patches(grids), grids)
        if seen.written:
            raise CheckFailedError(f"grids {listed(grids)}: the session wrote to its input {seen.written[0]!r}.")


@SHAPES.add
def outputs_owned(kit: Kit) -> None:
    """Embeddings belong to the caller, who may write to them; no later call writes to them."""
    grids = kit.calls[0]
    with _watched(kit.encoder) as seen:
        first = as_numpy(kit.encoder.encode(kit.patches(grids, 1), grids))
        kept = first.copy()
        kit.encode(kit.patches(grids, 2), grids)
    if not np.array_equal(first, kept):
        raise CheckFailedError(
            "embeddings of one call were overwritten by the next: the session returns its own buffer."
        )
    half = len(seen.outputs) // 2
    for (early, copies), (late, _) in zip(seen.outputs[:half], seen.outputs[half:], strict=True):
        for name, returned in early.items():
            if not np.array_equal(returned, copies[name]):
                raise CheckFailedError(f"output {name!r} of one call was overwritten by the next: return a copy of it.")
            if np.shares_memory(returned, late[name]):
                raise CheckFailedError(f"output {name!r} of two calls is the same memory: return a copy of it.")
    if not first.flags.writeable:
        raise CheckFailedError("embeddings are read-only; they belong to the caller.")
    first[:] = np.nan
    again = kit.encode(kit.patches(grids, 1), grids)
    kit.same(again, kept, "a call after the caller wrote to an earlier answer")


@SHAPES.add
def refusals(kit: Kit) -> None:
    """Wrong patches and grids are refused with an error of the right type, and the next call is correct."""
    grids = kit.calls[0]
    patches = kit.patches(grids)
    exact = kit.encode(patches, grids)
    odd = Grid(1, grids[0].h + 1, grids[0].w)
    nan = patches.copy()
    nan[len(nan) // 2, 3] = np.nan
    wrong: Sequence[tuple[str, type[InputError], NDArray[Any], Sequence[Grid]]] = (
        ("one patch too few", PatchesError, patches[:-1], grids),
        ("patches one value too narrow", PatchesError, patches[:, :-1], grids),
        ("patches of float64", PatchesError, patches.astype(np.float64), grids),
        ("uint8 pixels", PatchesError, patches.astype(np.uint8), grids),
        ("flat patches", PatchesError, patches.ravel(), grids),
        ("no grid", GridError, patches, ()),
        ("a grid that does not merge", GridError, kit.patches([odd]), (odd,)),
        ("NaN in a patch", NonFiniteError, nan, grids),
    )
    for what, kind, given, of in wrong:
        try:
            kit.encode(given, of)
        except kind:
            continue
        except Exception as error:
            raise CheckFailedError(f"{what}: {type(error).__name__} instead of {kind.__name__}: {error}") from error
        raise CheckFailedError(f"{what} is encoded instead of refused with {kind.__name__}.")
    kit.same(kit.encode(patches, grids), exact, "a correct call after refused ones")


@dataclass
class _Seen:
    """The inputs that a session wrote to, and the outputs of each of its calls with copies of them."""

    written: list[str] = field(default_factory=list)
    outputs: list[tuple[Arrays, Arrays]] = field(default_factory=list)


class _Watching(Session):
    """Gives a session read-only inputs and records its calls."""

    def __init__(self, inner: Session, seen: _Seen) -> None:
        self.capabilities, self._inner, self._seen = inner.capabilities, inner, seen

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        given = {name: array.view() for name, array in inputs.items()}
        for array in given.values():
            array.flags.writeable = False
        before = _copied(given)
        outputs = self._inner.run(given)
        self._seen.written += [name for name, array in given.items() if not np.array_equal(array, before[name])]
        arrays = {name: as_numpy(array) for name, array in outputs.items()}
        self._seen.outputs.append((arrays, _copied(arrays)))
        return outputs

    def close(self) -> None:
        self._inner.close()


def _copied(arrays: Arrays) -> Arrays:
    return {name: np.array(array) for name, array in arrays.items()}


@contextmanager
def _watched(encoder: Encoder) -> Iterator[_Seen]:
    """Record the calls of an encoder's sessions."""
    seen = _Seen()
    inner = [opened.session for opened in encoder.programs]
    for opened in encoder.programs:
        opened.session = _Watching(opened.session, seen)
    try:
        yield seen
    finally:
        for opened, session in zip(encoder.programs, inner, strict=True):
            opened.session = session


def _split(array: NDArray[Any], grids: Sequence[Grid], merge: int = 1) -> list[NDArray[Any]]:
    """Return the rows of each image: one for each of its patches, or with `merge`, for each of its tokens."""
    return np.split(array, np.cumsum([grid.tokens(merge) for grid in grids])[:-1])
