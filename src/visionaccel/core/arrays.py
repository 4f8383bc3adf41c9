"""Functions for arrays of numpy or torch, without importing torch.

Host arrays are numpy, with bfloat16 through ml_dtypes. A torch tensor is recognised by its type and, on the host,
viewed as numpy without a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any
"""A numpy array, or a torch tensor where a session declares `takes_tensors`."""

_SAMPLED_COLUMNS = 16


def is_tensor(array: Array) -> bool:
    """Return whether `array` is a torch tensor; false, without importing torch, when torch is not loaded."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def dtype_name(array: Array) -> str:
    """Return the dtype's plain name, such as `float32` or `bfloat16`, for numpy and torch alike."""
    return str(array.dtype).removeprefix("torch.")


def as_numpy(array: Array) -> NDArray[Any]:
    """Return `array` as numpy: numpy arrays and host tensors share their memory, other devices' tensors are copied."""
    if not is_tensor(array):
        return np.asarray(array)
    tensor = array.detach().cpu()
    if dtype_name(tensor) == "bfloat16":
        torch = sys.modules["torch"]
        return np.asarray(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.asarray(tensor.numpy())


def split_rows(array: Array, counts: Iterable[int]) -> list[Array]:
    """Split an array into views of consecutive rows, with the given number of rows in each."""
    ends = list(accumulate(counts, initial=0))
    return [array[start:end] for start, end in pairwise(ends)]


def column_blocks(rows: Array, width: int) -> Array:
    """View rows [N, width * blocks] as [N * blocks, width], so that each block of columns is judged by itself.

    A tower's output rows are the embedding of a token followed by its deepstack levels, all of one width
    (`TowerSpec.out`). Row n * blocks + b of the result is block b of row n: 0 is the embedding, others are levels.
    """
    return rows.reshape(-1, width)


def block_name(block: int) -> str:
    """Return what messages say after a token: nothing for its embedding, block 0, or which deepstack level it is.

    Levels count from 1, in the order of their columns.
    """
    return f", deepstack level {block}" if block else ""


def as_host_tensor(array: Array, dtype: str) -> Any:
    """Convert a numpy array to a torch tensor of `dtype`, which shares its memory if no cast is needed.

    numpy casts, rounding to nearest as torch does: torch would start threads, which wait for the runtime's right after
    an encode.
    """
    import torch

    if dtype != "bfloat16":
        return torch.from_numpy(array.astype(dtype, copy=False))
    return torch.from_numpy(array.astype(ml_dtypes.bfloat16, copy=False).view(np.int16)).view(torch.bfloat16)


def finite_rows(array: Array) -> NDArray[np.bool_]:
    """Return which rows of a 2-D floating-point array hold only finite numbers: a new bool array [rows] on the host.

    In float32 the sum of a row's squares shows NaN and infinity in one pass; where it may only have overflowed, the row
    is read again. One thread does this: a pool would wait for the runtime's threads, which hold the cores right after
    an encode.
    """
    if is_tensor(array):
        if array.device.type != "cpu":
            return np.asarray(sys.modules["torch"].isfinite(array).all(dim=1).cpu().numpy())
        array = as_numpy(array)
    if array.dtype == ml_dtypes.bfloat16:
        # bfloat16 is the upper half of float32: exponent bits all set mean NaN or infinity.
        exponent = np.uint16(0x7F80)
        return np.asarray(((array.view(np.uint16) & exponent) != exponent).all(axis=1))
    if array.dtype != np.float32:
        return np.asarray(np.isfinite(array).all(axis=1))
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite(np.einsum("ij,ij->i", array, array))
    suspects = np.flatnonzero(~finite)
    finite[suspects] = np.isfinite(array[suspects]).all(axis=1)
    return np.asarray(finite)


def constant_rows(array: Array) -> NDArray[np.bool_]:
    """Return which rows of a 2-D array repeat a single number, such as zero: a new bool array [rows] on the host.

    A few columns rule out nearly every row; only the rows that remain are read completely. Rows of one number do not
    count.
    """
    width = array.shape[1]
    if width < 2:
        return np.zeros(len(array), bool)
    sample = as_numpy(array[:, :: max(1, width // _SAMPLED_COLUMNS)])
    constant = (sample == sample[:, :1]).all(axis=1)
    suspects = np.flatnonzero(constant)
    if len(suspects):
        rows = as_numpy(array[suspects.tolist()])
        constant[suspects] = (rows == rows[:, :1]).all(axis=1)
    return np.asarray(constant)
