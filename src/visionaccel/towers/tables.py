"""Makes the grid-dependent tables of any tower in vectorised numpy, for any list of grids.

A tower with windows reorders merged tokens so that each attention window is contiguous, computes in that order, and
puts the embeddings back at the end. The formulas are those of transformers' `vision_utils` (`get_vision_window_index`,
`get_vision_position_ids`, interpolation of learned positions) and of its axial rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.program import (
    EMBEDDINGS,
    GRIDS,
    PATCH_EMBEDDINGS,
    PIXELS,
    WINDOW_EMBEDDINGS,
    Bucket,
    Coverage,
    FixedGrid,
    HostSplit,
)
from visionaccel.core.tower_spec import Positions, TowerSpec

Indices = NDArray[np.int64]
Floats = NDArray[np.float32]


def make_tables(spec: TowerSpec, grids: Sequence[Grid], *, grouped: bool = False) -> dict[str, NDArray[Any]]:
    """Make every table of one call with P patches, N tokens and F frames; most have the names of program inputs.

    Args:
        spec: The tower.
        grids: The grids of the call, divisible by the merge size (`Grid.check_divisible`).
        grouped: Order windows of equal size together, largest first, instead of in raster order.

    Returns:
        New arrays, which belong to the caller:

        - `frame_lengths`: int64 [F]; patches of each frame, the segments of full attention.
        - `rotary_cos`, `rotary_sin`: float32 [P, head_dim / 2]; in window order if the tower has windows, else in input
          order.
        - For a tower with learned positions: `position_index`, int64 [taps, P]; rows of the learned table, in input
          order; `position_weight`, float32 [taps, P, 1]; the factor of each row.
        - For a tower with windows, W of at most K patches: `window_index`, int64 [N]; the input token at each place of
          the window order; `reverse_index`, its inverse; `window_lengths`, int64 [W]; patches of each window;
          `window_patches`, int64 [W, K]; rows of each window in window order, padded with row 0; `window_mask`, int32
          [W, K]; 1 for a real patch, 0 for padding; `window_slots`, int64 [P]; the place of each row in the flattened
          [W * K] windows.
    """
    half = spec.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = np.float32(1.0) / np.power(np.float32(spec.rotary_base), exponents)
    places = [_places(spec.merge, grid) for grid in grids]
    angles = _each_frame([(p[:, :, None].astype(np.float32) * frequencies).reshape(-1, half) for p in places], grids)
    windows = {} if spec.window is None else _windows(spec, grids, grouped=grouped)
    if windows:
        angles = angles.reshape(-1, spec.merged, half)[windows["window_index"]].reshape(angles.shape)
    found = {
        "frame_lengths": np.concatenate([np.full(grid.t, grid.h * grid.w, dtype=np.int64) for grid in grids]),
        "rotary_cos": np.cos(angles),
        "rotary_sin": np.sin(angles),
        **windows,
    }
    if spec.positions is not None:
        taps = [_taps(spec.positions, p, grid) for p, grid in zip(places, grids, strict=True)]
        found["position_index"] = np.ascontiguousarray(_each_frame([rows for rows, _ in taps], grids).T)
        weights = _each_frame([scale for _, scale in taps], grids)
        found["position_weight"] = np.ascontiguousarray(weights.T)[:, :, None]
    return found


def _places(merge: int, grid: Grid) -> Indices:
    """Return row and column of each patch of a frame, [h * w, 2], in the processor's order: by merge blocks."""
    blocks = np.indices((grid.h, grid.w)).reshape(2, grid.h // merge, merge, grid.w // merge, merge)
    return blocks.transpose(1, 3, 2, 4, 0).reshape(-1, 2)


def _each_frame(parts: Sequence[NDArray[Any]], grids: Sequence[Grid]) -> NDArray[Any]:
    """Repeat the rows of one frame of each grid for all frames of that grid."""
    return np.concatenate([np.tile(part, (grid.t, 1)) for part, grid in zip(parts, grids, strict=True)])


def window_order(spec: TowerSpec, grids: Sequence[Grid], *, grouped: bool = False) -> tuple[Indices, Indices]:
    """Compute the window order of the merged tokens, and the windows' lengths.

    The tokens of a frame are cut into squares of side `spec.window`; windows at the bottom and right edges may be
    smaller. The tower must have windows. The arguments are those of `make_tables`.

    Returns:
        The input token at each place, int64 [N], and the windows' lengths in patches, int64 [W].
    """
    assert spec.window is not None
    orders, lengths, first = [], [], 0
    for grid in grids:
        height, width = grid.h // spec.merge, grid.w // spec.merge
        across = -(-width // spec.window)
        window = (np.arange(height)[:, None] // spec.window) * across + np.arange(width) // spec.window
        order = np.argsort(window, axis=None, kind="stable")
        starts = first + np.arange(grid.t) * (height * width)
        orders.append((starts[:, None] + order).ravel())
        lengths.append(np.tile(np.bincount(window.ravel()) * spec.merged, grid.t))
        first += grid.t * height * width
    index, sizes = np.concatenate(orders).astype(np.int64), np.concatenate(lengths).astype(np.int64)
    if not grouped:
        return index, sizes
    by_size = np.argsort(-sizes, kind="stable")
    windows = np.split(index, np.cumsum(sizes // spec.merged)[:-1])
    return np.concatenate([windows[place] for place in by_size]), sizes[by_size]


def _windows(spec: TowerSpec, grids: Sequence[Grid], *, grouped: bool) -> dict[str, NDArray[Any]]:
    index, lengths = window_order(spec, grids, grouped=grouped)
    within = np.arange(spec.window_patches)
    mask = within < lengths[:, None]
    starts = np.cumsum(lengths) - lengths
    return {
        "window_index": index,
        "reverse_index": np.argsort(index),
        "window_lengths": lengths,
        "window_patches": np.where(mask, starts[:, None] + within, 0),
        "window_mask": mask.astype(np.int32),
        "window_slots": np.flatnonzero(mask),
    }


def _taps(positions: Positions, places: Indices, grid: Grid) -> tuple[Indices, Floats]:
    """Return rows of the learned table and their weights for each patch of a frame: [h * w, taps] each."""
    rows, row_weights = _axis(positions, places[:, 0], grid.h)
    columns, column_weights = _axis(positions, places[:, 1], grid.w)
    index = rows[:, :, None] * positions.side + columns[:, None, :]
    weight = row_weights[:, :, None] * column_weights[:, None, :]
    return index.reshape(len(places), -1), weight.reshape(len(places), -1)


def _axis(positions: Positions, place: Indices, size: int) -> tuple[Indices, Floats]:
    """Return entries along one axis of the table and their weights, for each place out of `size`."""
    side, x = np.float32(positions.side), place.astype(np.float32)
    aligned = positions.align_corners
    source = x * (side - 1) / np.float32(max(size - 1, 1)) if aligned else (x + 0.5) * side / np.float32(size) - 0.5
    floor = np.floor(source)
    offsets = np.arange(2) if positions.mode == "bilinear" else np.arange(-1, 3)
    distance = np.abs(source[:, None] - floor[:, None] - offsets).astype(np.float32)
    if positions.mode == "bilinear":
        weights = np.maximum(1 - distance, 0)
    else:
        a = np.float32(-0.75)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, far)
    taps = np.clip(floor.astype(np.int64)[:, None] + offsets, 0, positions.side - 1)
    return taps, weights.astype(np.float32)


def tower_tables(spec: TowerSpec, grids: Sequence[Grid]) -> dict[str, NDArray[Any]]:
    """Make the tables of a call for a backend that builds the tower itself.

    Windows of equal size are together, largest first, so that each size is one batch of attention without padding. The
    frames are then not contiguous: gather with `frame_order` for full attention.

    Returns:
        The tables of `make_tables` with `grouped`; for a tower with windows also `frame_order`, int64 [P]: the rows of
        the window order, frame by frame.
    """
    tables = make_tables(spec, grids, grouped=True)
    if spec.window is not None:
        ends = np.cumsum(tables["frame_lengths"] // spec.merged)
        tokens = np.argsort(np.searchsorted(ends, tables["window_index"], side="right"), kind="stable")
        tables["frame_order"] = (tokens[:, None] * spec.merged + np.arange(spec.merged)).ravel()
    return tables


Signature = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


def signature(spec: TowerSpec, coverage: Coverage, host: HostSplit | None) -> Signature:
    """Return the inputs and outputs of an ONNX program.

    Args:
        spec: The tower.
        coverage: `AnyGrid`: sizes are names and every table is an input. `Bucket`: the same tables padded to fixed
            sizes, with the masks as terms that are added to the attention scores. `FixedGrid`: no table is an input.
        host: With a split, the input is embedded patches and the output is in the program's own order of tokens.
    """
    sizes: list[int | str] = ["patches", "tokens", "windows"]
    padded, baked = isinstance(coverage, Bucket), isinstance(coverage, FixedGrid)
    if isinstance(coverage, Bucket):
        sizes = [coverage.patches, coverage.patches // spec.merged, coverage.sizes.get("windows", 0)]
    elif isinstance(coverage, FixedGrid):
        sizes = [coverage.grid.patches, coverage.grid.tokens(spec.merge), 0]
    patches, tokens, windows = sizes
    windowed, learned = spec.window is not None and not baked, spec.positions is not None and not baked and not host
    width, half, taps = spec.window_patches, spec.head_dim // 2, spec.positions.taps if spec.positions else 0
    inputs = {
        TensorSpec(PATCH_EMBEDDINGS, "float32", (tokens, spec.merged, spec.hidden)): host is not None,
        TensorSpec(PIXELS, "float32", (patches, spec.patch_width)): host is None,
        TensorSpec("window_index", "int64", (tokens,)): windowed and not host,
        TensorSpec("reverse_index", "int64", (tokens,)): windowed and not host,
        TensorSpec("window_patches", "int64", (windows, width)): windowed,
        TensorSpec("window_mask", "int32", (windows, width)): windowed and not padded,
        TensorSpec("window_slots", "int64", (patches,)): windowed,
        TensorSpec("rotary_cos", "float32", (patches, half)): not baked,
        TensorSpec("rotary_sin", "float32", (patches, half)): not baked,
        TensorSpec("window_bias", "float32", (windows, 1, width)): windowed and padded,
        TensorSpec("frame_bias", "float32", (patches,)): padded,
        TensorSpec("frames", "int64", (1,)): not padded and not baked,
        TensorSpec("position_index", "int64", (taps, patches)): learned,
        TensorSpec("position_weight", "float32", (taps, patches, 1)): learned,
    }
    output = TensorSpec(WINDOW_EMBEDDINGS if host else EMBEDDINGS, "float32", (tokens, spec.out_width))
    return tuple(tensor for tensor, taken in inputs.items() if taken), (output,)


def checkpoint_signature(spec: TowerSpec) -> Signature:
    """Return the inputs and outputs of a program in the format `checkpoint`."""
    inputs = TensorSpec(PIXELS, "float32", ("patches", spec.patch_width)), TensorSpec(GRIDS, "int64", ("images", 3))
    return inputs, (TensorSpec(EMBEDDINGS, "float32", ("tokens", spec.out_width)),)
