"""Floating-point operations of a Qwen2.5-VL vision tower, from its sizes and the grids of a call.

A product of [m, k] and [k, n] counts 2 m k n, a multiplication and an addition for each term. Norms, activations,
softmax and rotary positions are left out: together well under a hundredth, and no matrix unit computes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visionaccel.core.grid import Grid, total_patches
from visionaccel.families.base import MatrixProduct, Operations
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.towers.tables import window_order

__all__ = ["count_operations"]


def count_operations(config: VisionConfig, grids: Sequence[Grid]) -> Operations:
    """Operations of one call.

    Attention over n patches is two products of n x n x head_dim in each head: 4 n**2 hidden_size in all. Full attention
    is over a frame, the other blocks' over the windows that `geometry.window_order` cuts it into.

    Args:
        config: Sizes of the tower.
        grids: The grids of the call, each divisible by the merge size.
    """
    patches, hidden, inner = total_patches(grids), config.hidden_size, config.intermediate_size
    merged = hidden * config.merged_patches
    tokens = patches // config.merged_patches
    full = len(config.fullatt_block_indexes)
    _, windows = window_order(config, grids)
    frames = sum(grid.t * grid.frame.patches**2 for grid in grids)
    return Operations(
        patch_embedding=MatrixProduct(patches, config.patch_width, hidden).operations,
        linears=(
            MatrixProduct(patches, hidden, 3 * hidden, config.depth),
            MatrixProduct(patches, hidden, hidden, config.depth),
            MatrixProduct(patches, hidden, inner, 2 * config.depth),
            MatrixProduct(patches, inner, hidden, config.depth),
        ),
        full_attention=4 * hidden * frames * full,
        window_attention=4 * hidden * int(np.square(windows).sum()) * (config.depth - full),
        merger=(MatrixProduct(tokens, merged, merged), MatrixProduct(tokens, merged, config.out_hidden_size)),
    )
