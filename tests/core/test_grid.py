"""Grids: parsing, checking and counting."""

import numpy as np
import pytest
from hypothesis import given

from strategies import grid_lists
from visionaccel.core.grid import Grid, as_grids, total_patches
from visionaccel.errors import GridError


@given(grid_lists())
def test_every_form_of_the_same_grids_is_equal(triples):
    import torch

    expected = tuple(Grid(*triple) for triple in triples)
    forms = (
        triples,
        expected,
        np.array(triples),
        torch.tensor(triples),
        [list(triple) for triple in triples],
        list(np.array(triples)),
    )
    assert all(as_grids(form, 2) == expected for form in forms)
    assert [grid.thw for grid in expected] == triples
    assert total_patches(expected) == int(np.prod(triples, axis=1).sum())
    assert sum(grid.tokens(2) for grid in expected) * 4 == total_patches(expected)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([], "no grid was given"),
        ([(1, 4)], "not a triple"),
        ([4, 4, 4], "not a triple"),
        (["1x4"], "not a triple"),
        (None, "grids are None, not triples"),
        (np.zeros((4, 1176)), r"^grid \[0\.0, [0., ]{1,60}… is not a triple"),
        ([(1, 4.0, 4)], r"h=4\.0, w=4\): h must be a positive integer"),
        (np.array([[1.0, 4.0, 4.0]]), "t must be a positive integer"),
        ([(1, np.array(4.0), 4)], "h must be a positive integer"),
        ([(1, 4, np.array([4, 4]))], "w must be a positive integer"),
        ([(1, 4, None)], "w must be a positive integer"),
        ([(1, 0, 4)], "h must be a positive integer"),
        ([(1, 4, -4)], "w must be a positive integer"),
        ([(0, 4, 4)], "t must be a positive integer"),
        ([(1, 5, 4)], "divisible by the merge size 2"),
        ([(1, 4, 4), (2, 4, 7)], "grid 2x4x7"),
    ],
)
def test_bad_grids_are_refused_with_a_reason_and_advice(grids, message):
    with pytest.raises(GridError, match=message) as caught:
        as_grids(grids, merge_size=2)
    assert caught.value.hint


def test_tokens_of_an_indivisible_grid_are_not_rounded():
    with pytest.raises(GridError, match="divisible"):
        Grid(1, 5, 4).tokens(2)
