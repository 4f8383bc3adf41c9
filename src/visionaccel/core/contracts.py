"""Shape, dtype and value contracts at the encoder's edges. Nothing is repeated, padded or cast to make a count fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import (
    Array,
    block_name,
    column_blocks,
    constant_rows,
    dtype_name,
    finite_rows,
    is_tensor,
)
from visionaccel.core.grid import Grid, total_patches
from visionaccel.errors import NonFiniteError, OutputError, PatchesError

PATCH_DTYPES = frozenset({"float32", "float16", "bfloat16"})
"""Dtypes in which patches are accepted."""

_DEFECT = "This is a fault of the backend or its device: report it with the output of `visionaccel explain`."


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor of a program.

    Attributes:
        name: Its name in the program.
        dtype: A name in numpy or ml_dtypes, such as `float32`, `bfloat16`, `int64`.
        shape: Sizes; a string names a size that varies from call to call, such as `patches`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def fits(self, shape: Sequence[int], sizes: Mapping[str, int]) -> bool:
        """Return whether `shape` is this tensor's shape, with the named sizes taken from `sizes`."""
        return tuple(shape) == tuple(sizes.get(s, -1) if isinstance(s, str) else s for s in self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


def check_patches(patches: Array, grids: Sequence[Grid], patch_width: int) -> None:
    """Check patches against their grids before they are encoded.

    Args:
        patches: float32, float16 or bfloat16 [P, patch_width], as the HF processor makes them.
        grids: One grid for each image or video; P must be the sum of t * h * w over the grids.
        patch_width: channels * temporal patch size * patch size**2.

    Raises:
        PatchesError: For a wrong rank, width, dtype or count.
        NonFiniteError: For NaN or infinity; the message names the image.
    """
    if not is_tensor(patches) and not isinstance(patches, np.ndarray):
        raise PatchesError(
            f"patches are a {type(patches).__name__}, not an array.",
            hint="Pass pixel_values as the model's own processor returns them.",
        )
    shape = tuple(patches.shape)
    if len(shape) != 2 or shape[1] != patch_width:
        raise PatchesError(
            f"patches have shape {list(shape)}; this model expects [patches, {patch_width}].",
            hint="Pass pixel_values as the model's own processor returns them.",
        )
    if dtype_name(patches) not in PATCH_DTYPES:
        raise PatchesError(
            f"patches have dtype {dtype_name(patches)}; it must be one of {', '.join(sorted(PATCH_DTYPES))}.",
            hint="Pass the processor's normalised pixel_values, not raw pixels.",
        )
    expected = total_patches(grids)
    if shape[0] != expected:
        listed = ", ".join(map(str, grids[:8])) + (", ..." if len(grids) > 8 else "")
        raise PatchesError(
            f"{shape[0]} patches were given, but the grids ({listed}) describe {expected}.",
            hint="Pass the pixel_values and the grid_thw of the same processor call.",
        )
    finite = finite_rows(patches)
    if not finite.all():
        bad = int(np.argmin(finite))
        ends = np.cumsum([grid.patches for grid in grids])
        item = int(np.searchsorted(ends, bad, side="right"))
        raise NonFiniteError(
            f"patches of image {item} (grid {grids[item]}) contain NaN or infinity, first in row {bad}.",
            hint="Check the image and its normalisation.",
        )


def check_output(backend: str, spec: TensorSpec, array: Array | None, sizes: Mapping[str, int]) -> None:
    """Check one tensor that a backend returned.

    Args:
        backend: The backend's name, for messages.
        spec: The tensor that the program declares.
        array: The returned tensor [rows, width]; None if no tensor of that name was returned.
        sizes: The sizes of this call, by the names in `spec.shape`.

    Raises:
        OutputError: If it is missing, has the wrong shape or dtype, or contains NaN or infinity.
    """
    if array is None:
        raise OutputError(f"backend {backend!r} returned no tensor named {spec.name!r}.", hint=_DEFECT)
    if not spec.fits(tuple(array.shape), sizes) or dtype_name(array) != spec.dtype:
        wanted = [sizes.get(s, s) if isinstance(s, str) else s for s in spec.shape]
        raise OutputError(
            f"backend {backend!r} returned {spec.name!r} as {dtype_name(array)}{list(array.shape)}; "
            f"the program declares {spec.dtype}{wanted}.",
            hint=_DEFECT,
        )
    _refuse(backend, spec.name, ~finite_rows(array)[:, None], "NaN or infinity")


def check_embeddings(backend: str, rows: Array, width: int) -> None:
    """Check the finite embeddings of a call, without a program's padding.

    An embedding that repeats one number was not computed, and neither was a deepstack level that does. A backend whose
    device writes into the host's memory fills it with NaN first, so that `check_output` finds rows that were not
    written.

    Args:
        backend: The backend's name, for messages.
        rows: [tokens, out_width].
        width: Width of an embedding, and of each deepstack level next to it.

    Raises:
        OutputError: If an embedding or a deepstack level is constant.
    """
    constant = constant_rows(column_blocks(rows, width)).reshape(len(rows), -1)
    _refuse(backend, "embeddings", constant, "a single repeated number")


def _refuse(backend: str, name: str, wrong: NDArray[np.bool_], what: str) -> None:
    """Raise if any block of columns is wrong: bool [rows, blocks]."""
    if wrong.any():
        rows = np.flatnonzero(wrong.any(axis=1))
        first = int(rows[0])
        raise OutputError(
            f"backend {backend!r} returned {what} in {len(rows)} of {len(wrong)} rows of {name!r}, first in row "
            f"{first}{block_name(int(np.argmax(wrong[first])))}.",
            hint=_DEFECT,
        )
