"""Counts the floating-point operations of a vision tower from its description and the grids of a call.

A product of [m, k] and [k, n] counts as 2 m k n: a multiplication and an addition for each term. Norms, activations,
softmax, learned and rotary positions are not counted: together they are well under 1 %, and matrix units do not compute
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from visionaccel.core.grid import Grid, total_patches
from visionaccel.core.tower_spec import Gated, Linear, Merge, Step, TowerSpec
from visionaccel.towers import window_order


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """Products of one shape, [rows, inner] by [inner, columns], which a call computes `count` times."""

    rows: int
    inner: int
    columns: int
    count: int = 1

    @property
    def operations(self) -> int:
        """Floating-point operations of all `count` products."""
        return 2 * self.rows * self.inner * self.columns * self.count


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations of one call of a tower.

    Attributes:
        patch_embedding: Operations of the patch embedding.
        linears: The products of the linear layers in the blocks.
        full_attention: Operations of attention over whole frames.
        window_attention: Operations of attention within windows.
        merger: The products that merge patches into tokens, including those of deepstack levels.
    """

    patch_embedding: int
    linears: tuple[MatrixProduct, ...]
    full_attention: int
    window_attention: int
    merger: tuple[MatrixProduct, ...]

    @property
    def total(self) -> int:
        """The sum of all parts."""
        products = sum(product.operations for product in (*self.linears, *self.merger))
        return self.patch_embedding + products + self.full_attention + self.window_attention

    @property
    def full_attention_share(self) -> float:
        """Share of full attention, which grows with the square of the number of patches."""
        return self.full_attention / self.total


def count_operations(spec: TowerSpec, grids: Sequence[Grid]) -> Operations:
    """Count the operations of one call; its grids must be divisible by the merge size.

    Attention over n patches is two products of n x n x head_dim in each head: 4 n**2 hidden in all. Full attention
    covers a frame; the other blocks attend within the windows of `window_order`.
    """
    patches = total_patches(grids)
    windowed = sum(spec.windowed(block) for block in range(spec.depth))
    windows = window_order(spec, grids)[1] if windowed else np.zeros(1, np.int64)
    frames = sum(grid.t * grid.frame.patches**2 for grid in grids)
    levels = _products(spec, spec.deepstack_merger, patches, len(spec.deepstack))
    return Operations(
        patch_embedding=sum(product.operations for product in _products(spec, spec.embed, patches, 1)),
        linears=tuple(_products(spec, (spec.qkv, spec.proj, *spec.mlp), patches, spec.depth)),
        full_attention=4 * spec.hidden * frames * (spec.depth - windowed),
        window_attention=4 * spec.hidden * int(np.square(windows).sum()) * windowed,
        merger=(*_products(spec, spec.merger, patches, 1), *levels),
    )


def _products(spec: TowerSpec, steps: Sequence[Step], rows: int, count: int) -> Iterator[MatrixProduct]:
    """Yield the products of a sequence of steps that runs `count` times on `rows` patches."""
    for step in steps:
        match step:
            case Linear():
                yield MatrixProduct(rows, step.inputs, step.outputs, count)
            case Gated():
                yield MatrixProduct(rows, step.gate.inputs, step.gate.outputs, 2 * count)
                yield MatrixProduct(rows, step.down.inputs, step.down.outputs, count)
            case Merge():
                rows //= spec.merged
