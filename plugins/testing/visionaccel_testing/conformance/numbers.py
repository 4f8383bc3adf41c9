"""Level 2: the right numbers for every token, and the right answers of a language model."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from visionaccel.core.comparison import token_cosines
from visionaccel.core.grid import Grid
from visionaccel_testing.checkpoints import TINY
from visionaccel_testing.conformance.check import CheckFailedError, Checks, NotApplicableError
from visionaccel_testing.conformance.digits_reading import LEAST_AGREEMENT, read_digits
from visionaccel_testing.conformance.kit import WINDOW_SIDE, Kit, encoded, grids_of, listed

NUMBERS = Checks(2)

_IMAGES = 60
"""Digits images to read: enough for the least agreement to allow one different answer."""

_MOVED, _STILL = 0.05, 0.02
"""Changes of a token as a share of its length: the least if its own patch is replaced, and the most by rounding."""


@NUMBERS.add
def cosines(kit: Kit) -> None:
    """Every token is as close to the float32 reference as its precision promises."""
    for number, grids in enumerate(kit.calls):
        kit.check(grids, f"grids {listed(grids)} in {kit.encoder.capabilities.precision}", 10 + number)


@NUMBERS.add
def generated_grids(kit: Kit) -> None:
    """Every token is that close for any grids."""

    @kit.holds(kit.grid_lists())
    def tried(grids: tuple[Grid, ...]) -> None:
        kit.check(grids, f"grids {listed(grids)}")


@NUMBERS.add
def silent_rows(kit: Kit) -> None:
    """No embedding is zero, constant, or equal to that of another token."""
    for grids in kit.calls:
        found = kit.encode(kit.patches(grids, 20), grids)
        constant = np.flatnonzero((found == found[:, :1]).all(axis=1))
        if len(constant):
            raise CheckFailedError(
                f"grids {listed(grids)}: {len(constant)} of {len(found)} embeddings are a single repeated number, "
                f"{found[constant[0], 0]} in row {constant[0]}: rows were never written."
            )
        repeated = len(found) - len(np.unique(found, axis=0))
        if repeated:
            raise CheckFailedError(
                f"grids {listed(grids)}: {repeated} embeddings repeat another one: rows are copied to make a count fit."
            )


@NUMBERS.add
def axes(kit: Kit) -> None:
    """Height and width of a grid are not mixed up."""
    uneven = [call for call in kit.calls if len(call) == 1 and call[0].h != call[0].w]
    if not uneven:
        raise NotApplicableError("all grids that it takes are square.")
    for (grid,) in uneven:
        patches = kit.patches([grid], 30)
        found = kit.encode(patches, [grid])
        right, turned = (
            float(token_cosines(found, kit.expected(patches, [each])).mean())
            for each in (grid, Grid(grid.t, grid.w, grid.h))
        )
        if turned > right:
            raise CheckFailedError(
                f"grid {grid}: embeddings are those of grid {grid.t}x{grid.w}x{grid.h} (mean cosine {turned:.4f}, and "
                f"{right:.4f} to its own): height and width are swapped."
            )


@NUMBERS.add
def windows(kit: Kit) -> None:
    """Where no layer attends beyond its window, a patch changes the tokens of that window and no others."""
    subject = kit.subject_of("windows", {**TINY, "fullatt_block_indexes": []})
    with subject.open() as encoder:
        still = [call for call in grids_of(encoder) if len(call) == 1 and call[0].t == 1]
        several = [call for call in still if max(call[0].h, call[0].w) > WINDOW_SIDE]
        if not several:
            raise NotApplicableError("no grid that it takes has more than one window.")
        merge = encoder.tower.merge_size
        for (grid,) in several:
            columns, side = grid.w // merge, WINDOW_SIDE // merge
            window = np.array([(t // columns // side, t % columns // side) for t in range(grid.tokens(merge))])
            patches = kit.patches([grid], 40)
            before = encoded(encoder, patches, [grid])
            for token in (0, len(window) // 2, len(window) - 1):
                changed = patches.copy()
                changed[token * merge**2] = 3 * kit.patches([grid], 41)[0]
                after = encoded(encoder, changed, [grid])
                moved = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
                within = (window == window[token]).all(axis=1)
                changes = f"grid {grid}: a changed patch of token {token}"
                if moved[token] < _MOVED:
                    raise CheckFailedError(f"{changes} leaves that token as it was: its embedding is in another row.")
                if (moved[~within] > _STILL).any():
                    other = int(np.flatnonzero(~within & (moved > _STILL))[0])
                    raise CheckFailedError(
                        f"{changes} also changes token {other}, which is in another window: windows are cut in the "
                        "wrong places."
                    )
                if not (moved[within] > 0).all():
                    raise CheckFailedError(
                        f"{changes} leaves other tokens of its window as they were: attention does not reach all of "
                        "the window."
                    )


@NUMBERS.add
def digits(kit: Kit) -> None:
    """A small model that reads handwritten digits gives the same answers as with the reference."""
    if find_spec("digits_vlm") is None or find_spec("sklearn") is None:
        raise CheckFailedError("the digits model is not installed; pip install 'visionaccel[testing]'.")
    from digits_vlm import checkpoint_path

    folder = checkpoint_path()
    with kit.subject_on(folder, kit.work("digits") / "source").open() as encoder:
        for answers in read_digits(folder, encoder, kit.reference_of(folder), _IMAGES):
            if answers.agreement < LEAST_AGREEMENT:
                raise CheckFailedError(
                    f"the digits model reads {answers.agreement:.1%} of {_IMAGES} images ({answers.fit}) as with the "
                    f"reference, not {LEAST_AGREEMENT:.0%}; {answers.accuracy:.1%} of the answers are correct."
                )
