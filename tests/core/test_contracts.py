"""What goes in and what comes out is checked; nothing is made to fit."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visionaccel.core.arrays import as_host_tensor, as_numpy, dtype_name, finite_rows
from visionaccel.core.contracts import TensorSpec, check_output, check_patches
from visionaccel.core.grid import Grid
from visionaccel.errors import NonFiniteError, OutputError, PatchesError

GRIDS = (Grid(1, 4, 6), Grid(2, 2, 4))
WIDTH = 12


def patches(dtype=np.float32):
    return np.random.default_rng(0).standard_normal((40, WIDTH)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_right_patches_pass_in_every_float_dtype(dtype):
    check_patches(patches(dtype), GRIDS, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_right_tensors_pass_in_every_float_dtype(dtype):
    check_patches(torch.zeros(40, WIDTH, dtype=dtype), GRIDS, WIDTH)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (patches()[0], r"expects \[patches, 12\]"),
        (patches()[:, :-1], r"shape \[40, 11\]"),
        (patches()[:-1], "39 patches were given, but the grids .* describe 40"),
        (np.concatenate([patches(), patches()]), "80 patches"),
        (patches(np.float64), "float64"),
        (patches().astype(np.uint8), "uint8"),
    ],
)
def test_wrong_patches_are_refused(bad, message):
    with pytest.raises(PatchesError, match=message) as caught:
        check_patches(bad, GRIDS, WIDTH)
    assert caught.value.hint


@pytest.mark.parametrize("thing", [None, "page.png", [[0.0] * WIDTH] * 40])
def test_what_is_not_an_array_is_refused(thing):
    with pytest.raises(PatchesError, match=r"patches are a \w+, not an array"):
        check_patches(thing, GRIDS, WIDTH)


@given(st.integers(0, 39), st.integers(0, WIDTH - 1), st.sampled_from([np.nan, np.inf, -np.inf]))
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, torch.float32, torch.bfloat16])
def test_one_non_finite_value_is_found_and_its_image_named(dtype, row, column, value):
    bad = torch.zeros(40, WIDTH, dtype=dtype) if isinstance(dtype, torch.dtype) else patches(dtype)
    bad[row, column] = value
    image = 0 if row < 24 else 1
    with pytest.raises(NonFiniteError, match=rf"image {image} \(grid {GRIDS[image]}\).*row {row}\."):
        check_patches(bad, GRIDS, WIDTH)


def test_large_finite_values_are_finite():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        largest = np.full((2, 3), ml_dtypes.finfo(dtype).max, dtype=dtype)
        assert finite_rows(largest).all()
        assert finite_rows(-largest).all()


def test_bfloat16_tensors_are_viewed_not_copied():
    tensor = torch.randn(4, 3).bfloat16()
    view = as_numpy(tensor)
    assert view.dtype == ml_dtypes.bfloat16
    assert view.ctypes.data == tensor.data_ptr()
    assert dtype_name(tensor) == dtype_name(view) == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_host_tensors_are_rounded_as_torch_rounds(dtype):
    values = np.random.default_rng(0).standard_normal((64, 33)).astype(np.float32)
    tensor = as_host_tensor(values, str(dtype).removeprefix("torch."))
    assert tensor.dtype == dtype
    assert torch.equal(tensor, torch.from_numpy(values).to(dtype))
    assert (tensor.data_ptr() == values.ctypes.data) == (dtype == torch.float32)


SPEC = TensorSpec("embeddings", "float32", ("tokens", 8))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "no tensor named 'embeddings'"),
        (np.zeros((9, 8), np.float32), r"float32\[9, 8\]; the program declares float32\[10, 8\]"),
        (np.zeros((10, 7), np.float32), r"float32\[10, 7\]"),
        (np.zeros((10, 8), np.float64), "float64"),
        (np.full((10, 8), np.nan, np.float32), "NaN or infinity in 10 of 10 rows"),
    ],
)
def test_wrong_outputs_are_the_backends_fault(output, message):
    with pytest.raises(OutputError, match=message):
        check_output("someone", SPEC, output, {"tokens": 10})


def test_right_outputs_pass():
    rows = np.arange(80, dtype=np.float32).reshape(10, 8)
    check_output("someone", SPEC, rows, {"tokens": 10})
    check_output("someone", SPEC, torch.from_numpy(rows), {"tokens": 10})
