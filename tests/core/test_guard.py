"""The guard of outputs: what a device left out, cleared or filled is found in any row, and nothing else is."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visionaccel.core.arrays import constant_rows, finite_rows
from visionaccel.core.contracts import TensorSpec, check_embeddings, check_output
from visionaccel.errors import OutputError

SPOILS = {
    "one NaN": lambda row, rng: row.__setitem__(rng.integers(len(row)), np.nan),
    "NaN": lambda row, rng: row.fill(np.nan),
    "one infinity": lambda row, rng: row.__setitem__(rng.integers(len(row)), -np.inf),
    "both infinities": lambda row, rng: row.__setitem__(slice(0, 2), [np.inf, -np.inf]),
    "zeros": lambda row, rng: row.fill(0),
    "one number": lambda row, rng: row.fill(-3.5),
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@given(
    rows=st.integers(1, 40),
    width=st.sampled_from([2, 3, 16, 17, 200, 3584]),
    spoil=st.sampled_from(sorted(SPOILS)),
    dtype=st.sampled_from(sorted(DTYPES)),
    tensor=st.booleans(),
    data=st.data(),
)
def test_exactly_the_spoilt_rows_are_found(rows, width, spoil, dtype, tensor, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    hit = data.draw(st.sets(st.integers(0, rows - 1), min_size=1))
    array = rng.standard_normal((rows, width)).astype(np.float32)
    array[:, 0], array[:, -1] = 1.5, 2.5  # no row is constant by chance, whatever the dtype
    for row in hit:
        SPOILS[spoil](array[row], rng)
    array = array.astype(DTYPES[dtype])
    given_array = torch.from_numpy(array) if tensor and dtype != "bfloat16" else array
    expected = np.isin(np.arange(rows), sorted(hit))
    constant = spoil in ("zeros", "one number")
    np.testing.assert_array_equal(finite_rows(given_array), ~expected | constant)
    np.testing.assert_array_equal(constant_rows(given_array), expected & constant)

    def look():
        check_output("someone", TensorSpec("x", dtype, ("n", width)), given_array, {"n": rows})
        check_embeddings("someone", given_array, width)

    with pytest.raises(OutputError, match=f"in {len(hit)} of {rows} rows of '\\w+', first in row {min(hit)}"):
        look()


def test_padding_may_be_zeros_and_embeddings_may_not():
    rows = np.zeros((4, 8), np.float32)
    check_output("someone", TensorSpec("padded", "float32", (4, 8)), rows, {})
    with pytest.raises(OutputError, match="a single repeated number in 4 of 4 rows of 'embeddings', first in row 0"):
        check_embeddings("someone", rows, 8)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_a_deepstack_level_may_not_be_zeros_next_to_good_ones(make):
    rows = np.random.default_rng(0).standard_normal((5, 24), dtype=np.float32)
    check_embeddings("someone", make(rows), 8)
    rows[[1, 3], 8:16] = 0
    rows[3:, 16:] = 2.5
    with pytest.raises(OutputError, match="in 3 of 5 rows of 'embeddings', first in row 1, deepstack level 1"):
        check_embeddings("someone", make(rows), 8)
    rows[0, :8] = 1
    with pytest.raises(OutputError, match=r"in 4 of 5 rows of 'embeddings', first in row 0\."):
        check_embeddings("someone", make(rows), 8)


def test_rows_whose_sums_overflow_are_finite():
    array = np.full((3, 64), 3e38, np.float32)
    array[:, 1] = 1
    assert finite_rows(array).all()
    check_output("someone", TensorSpec("x", "float32", (3, 64)), array, {})


def test_rows_that_are_constant_where_one_looks_first_are_read_whole():
    array = np.zeros((2, 3584), np.float32)
    array[1, 5] = 1e-30
    assert constant_rows(array).tolist() == [True, False]


def test_rows_that_are_not_contiguous_are_looked_at_too():
    array = np.arange(80, dtype=np.float32).reshape(8, 10).T
    assert finite_rows(array).all()
    assert not constant_rows(array).any()
    array[3] = np.inf
    assert finite_rows(array).tolist() == [row != 3 for row in range(10)]
