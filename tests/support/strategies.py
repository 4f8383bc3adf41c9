"""Hypothesis strategies for grids."""

from hypothesis import strategies as st

MERGE = 2


def grids(most_side: int = 11, most_frames: int = 3) -> st.SearchStrategy[tuple[int, int, int]]:
    """One grid of up to `most_side` merged rows and columns, partial and 1x1 windows included."""
    side = st.integers(1, most_side).map(lambda merged: merged * MERGE)
    return st.tuples(st.integers(1, most_frames), side, side)


def grid_lists(most: int = 4, **sizes: int) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    """Several images and videos in one call."""
    return st.lists(grids(**sizes), min_size=1, max_size=most)
