"""Grid-dependent tables of Qwen2.5-VL's vision tower, in vectorised numpy, for any list of grids.

The tower reorders merged tokens so that each attention window is contiguous, computes in that order, and puts the
embeddings back at the end. The formulas are those of transformers' `vision_utils.get_vision_window_index`,
`get_vision_position_ids` and `Qwen2_5_VLVisionRotaryEmbedding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.grid import Grid
from visionaccel.families.qwen2_5_vl.config import VisionConfig

__all__ = ["Tables", "by_window_size", "make_tables", "rotary_angles", "tower_tables", "window_order"]

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """Host-made arrays for one call. P patches, N tokens, W windows of at most K patches, F frames.

    Attributes:
        window_index: int64 [N]; token `window_index[i]` of the input order stands at place i in window order.
        reverse_index: int64 [N]; inverse of `window_index`.
        window_lengths: int64 [W]; patches of each window.
        window_patches: int64 [W, K]; rows (in window order) of each window, padded with row 0.
        window_mask: int32 [W, K]; 1 for a real patch, 0 for padding.
        window_slots: int64 [P]; where each row lies in the flattened [W * K] windows.
        frame_lengths: int64 [F]; patches of each frame, the segments of full attention.
        rotary_cos: float32 [P, head_dim / 2]; in window order.
        rotary_sin: float32 [P, head_dim / 2]; in window order.
    """

    window_index: Indices
    reverse_index: Indices
    window_lengths: Indices
    window_patches: Indices
    window_mask: NDArray[np.int32]
    window_slots: Indices
    frame_lengths: Indices
    rotary_cos: NDArray[np.float32]
    rotary_sin: NDArray[np.float32]


def window_order(config: VisionConfig, grids: Sequence[Grid]) -> tuple[Indices, Indices]:
    """Window order of the merged tokens and the windows' lengths.

    A frame's merged rows and columns are cut every `window_tokens`; windows at the bottom and right edges may be
    smaller.

    Returns:
        `window_index` int64 [N] and `window_lengths` int64 [W] in patches.
    """
    side, merge = config.window_tokens, config.spatial_merge_size
    orders, lengths, first = [], [], 0
    for grid in grids:
        height, width = grid.h // merge, grid.w // merge
        rows, columns = np.arange(height), np.arange(width)
        windows_across = -(-width // side)
        window = (rows[:, None] // side) * windows_across + columns[None, :] // side
        frame_order = np.argsort(window, axis=None, kind="stable")
        starts = first + np.arange(grid.t) * (height * width)
        orders.append((starts[:, None] + frame_order).ravel())
        lengths.append(np.tile(np.bincount(window.ravel()) * config.merged_patches, grid.t))
        first += grid.t * height * width
    return np.concatenate(orders).astype(np.int64), np.concatenate(lengths).astype(np.int64)


def by_window_size(config: VisionConfig, window_index: Indices, window_lengths: Indices) -> tuple[Indices, Indices]:
    """The same windows with those of one size together, largest first: `grouped` order from `raster` order."""
    order = np.argsort(-window_lengths, kind="stable")
    tokens = window_lengths // config.merged_patches
    starts = np.concatenate([[0], np.cumsum(tokens)[:-1]])
    pieces = [window_index[starts[i] : starts[i] + tokens[i]] for i in order]
    return np.concatenate(pieces), window_lengths[order]


def rotary_angles(config: VisionConfig, grids: Sequence[Grid]) -> NDArray[np.float32]:
    """Rotary angles of every patch in input order: float32 [P, head_dim / 2], rows' then columns' frequencies.

    Patches come merge block by merge block, as the processor lays them out; frames of a video repeat the positions.
    """
    merge, spatial = config.spatial_merge_size, config.head_dim // 2
    exponents = np.arange(0, spatial, 2, dtype=np.float32) / np.float32(spatial)
    frequencies = np.float32(1.0) / np.power(np.float32(config.rope_theta), exponents)
    angles = []
    for grid in grids:
        blocks = (grid.h // merge, merge, grid.w // merge, merge)
        positions = np.indices((grid.h, grid.w), dtype=np.float32).reshape(2, *blocks)
        positions = positions.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
        frame = (positions[:, :, None] * frequencies).reshape(len(positions), spatial)
        angles.append(np.tile(frame, (grid.t, 1)))
    return np.concatenate(angles)


def make_tables(config: VisionConfig, grids: Sequence[Grid], *, grouped: bool = False) -> Tables:
    """Every table of one call. Grids must be divisible by the merge size (`Grid.check_divisible`).

    Args:
        config: Sizes of the tower.
        grids: The grids of the call.
        grouped: Windows of one size together instead of in raster order.
    """
    window_index, window_lengths = window_order(config, grids)
    if grouped:
        window_index, window_lengths = by_window_size(config, window_index, window_lengths)
    reverse_index = np.empty_like(window_index)
    reverse_index[window_index] = np.arange(len(window_index))

    width = config.window_patches
    offsets = np.concatenate([[0], np.cumsum(window_lengths)[:-1]])
    within = np.arange(width)
    mask = within < window_lengths[:, None]
    rows = np.where(mask, offsets[:, None] + within, 0)

    angles = rotary_angles(config, grids)
    blocks = angles.reshape(-1, config.merged_patches, angles.shape[1])
    angles = blocks[window_index].reshape(angles.shape)
    return Tables(
        window_index=window_index,
        reverse_index=reverse_index,
        window_lengths=window_lengths,
        window_patches=rows.astype(np.int64),
        window_mask=mask.astype(np.int32),
        window_slots=np.flatnonzero(mask).astype(np.int64),
        frame_lengths=np.concatenate([np.full(g.t, g.h * g.w, dtype=np.int64) for g in grids]),
        rotary_cos=np.cos(angles),
        rotary_sin=np.sin(angles),
    )


def tower_tables(config: VisionConfig, grids: Sequence[Grid]) -> Mapping[str, NDArray[Any]]:
    """The tables of a call for a backend that builds the tower itself, by their names in `Tables`.

    Windows of one size lie together, largest first, so that those of a size are one batch of attention without any
    padding. Frames are then not contiguous: `frame_order` brings them together for full attention.

    Returns:
        `window_index`, `reverse_index`, `window_lengths`, `frame_lengths`, `rotary_cos` and `rotary_sin` as in
        `Tables`, and `frame_order`: int64 [P]; row `frame_order[i]` of the window order stands at place i when the
        frames, in their own order, are each contiguous.
    """
    tables = make_tables(config, grids, grouped=True)
    merged = config.merged_patches
    frame_ends = np.cumsum(tables.frame_lengths // merged)
    frame_of_token = np.searchsorted(frame_ends, tables.window_index, side="right")
    tokens = np.argsort(frame_of_token, kind="stable")
    return {
        "window_index": tables.window_index,
        "reverse_index": tables.reverse_index,
        "window_lengths": tables.window_lengths,
        "frame_lengths": tables.frame_lengths,
        "frame_order": (tokens[:, None] * merged + np.arange(merged)).ravel(),
        "rotary_cos": tables.rotary_cos,
        "rotary_sin": tables.rotary_sin,
    }
