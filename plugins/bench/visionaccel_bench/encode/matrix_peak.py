"""What this machine's processor reaches in matrix products: oneDNN with packed weights, which torch brings.

Products of the tower's own shapes, with weights packed once: the most that a tower made of such products could reach.
Runs in a process of its own only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["MOST_ROWS", "rates"]

MOST_ROWS = 4096
"""Products of more rows are no faster."""


def rates(shapes: Sequence[tuple[int, int, int]], threads: int) -> dict[str, list[float]]:
    """Operations a second of one product of each shape, by dtype; without those that this processor does not have.

    Weights are packed, and a first product is done, before the one that is timed. Nothing is kept between calls.

    Args:
        shapes: Rows, inner width and columns of each product.
        threads: Threads of the products.

    Raises:
        Exception: If torch is not installed or was built without oneDNN.
    """
    import torch

    from visionaccel.core.packed_products import why_not_packed

    torch.set_num_threads(threads)
    found = {"float32": [_rate(torch.float32, *shape) for shape in shapes]}
    if why_not_packed(torch.bfloat16) is None:
        found["bfloat16"] = [_rate(torch.bfloat16, *shape) for shape in shapes]
    return found


def _rate(dtype: torch.dtype, rows: int, inner: int, columns: int) -> float:
    import torch

    from visionaccel.core.packed_products import PackedWeight

    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator).to(dtype)
    right = torch.randn(columns, inner, generator=generator).to(dtype)
    packed = PackedWeight(right, rows=rows)
    seconds = 0.0
    with torch.inference_mode():
        for _ in range(2):
            started = time.perf_counter()
            packed.unary(left)
            seconds = time.perf_counter() - started
    return 2 * rows * inner * columns / seconds
