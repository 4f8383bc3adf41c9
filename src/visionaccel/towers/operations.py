"""Floating-point operations of a vision tower, from its description and the grids of a call.

A product of [m, k] and [k, n] counts 2 m k n, a multiplication and an addition for each term. Norms, activations,
softmax, learned and rotary positions are left out: together well under a hundredth, and no matrix unit computes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from visionaccel.core.grid import Grid, total_patches
from visionaccel.core.tower_spec import Gated, Linear, Merge, Step, TowerSpec
from visionaccel.towers.tables import window_order


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """Products of one shape, [rows, inner] by [inner, columns], that a call has `count` times."""

    rows: int
    inner: int
    columns: int
    count: int = 1

    @property
    def operations(self) -> int:
        """Floating-point operations of all of them."""
        return 2 * self.rows * self.inner * self.columns * self.count


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations of one call of a tower.

    Attributes:
        patch_embedding: Of the patch embedding.
        linears: The products in the blocks.
        full_attention: Of attention over whole frames.
        window_attention: Of attention within windows.
        merger: The products that make tokens of patches, those of deepstack levels among them.
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
        """The share that grows with the square of the patches."""
        return self.full_attention / self.total


def count_operations(spec: TowerSpec, grids: Sequence[Grid]) -> Operations:
    """Operations of one call; its grids must be divisible by the merge size.

    Attention over n patches is two products of n x n x head_dim in each head: 4 n**2 hidden in all. Full attention is
    over a frame, the other blocks' over the windows that `window_order` cuts it into.
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
    """The products of a sequence that comes `count` times, of `rows` patches."""
    for step in steps:
        match step:
            case Linear():
                yield MatrixProduct(rows, step.inputs, step.outputs, count)
            case Gated():
                yield MatrixProduct(rows, step.gate.inputs, step.gate.outputs, 2 * count)
                yield MatrixProduct(rows, step.down.inputs, step.down.outputs, count)
            case Merge():
                rows //= spec.merged
