"""What this machine's processor reaches in matrix products: oneDNN with packed weights, which torch brings.

Products of the tower's own shapes, with weights packed once: the most that a tower made of such products could reach.
Runs in a process of its own only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["MOST_ROWS", "rates"]

MOST_ROWS = 4096
"""Products of more rows are no faster."""

_packed: dict[tuple[str, int, int, int], Callable[[], Any]] = {}


def rates(shapes: Sequence[tuple[int, int, int]], threads: int) -> dict[str, list[float]]:
    """Operations a second of one product of each shape, by dtype.

    Weights are packed at the first call with a shape, whose rate therefore does not count.

    Args:
        shapes: Rows, inner width and columns of each product.
        threads: Threads of the products.

    Raises:
        Exception: If torch is not installed or was built without oneDNN.
    """
    import torch

    torch.set_num_threads(threads)
    found: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        for rows, inner, columns in shapes:
            product = _product(dtype, rows, inner, columns)
            started = time.perf_counter()
            product()
            seconds = time.perf_counter() - started
            found.setdefault(dtype, []).append(2 * rows * inner * columns / seconds)
    return found


def _product(dtype: str, rows: int, inner: int, columns: int) -> Callable[[], Any]:
    import torch

    key = dtype, rows, inner, columns
    if key not in _packed:
        generator = torch.Generator().manual_seed(0)
        kind = getattr(torch, dtype)
        left = torch.randn(rows, inner, generator=generator).to(kind)
        right = torch.randn(columns, inner, generator=generator).to(kind)
        packed = torch.ops.mkldnn._reorder_linear_weight(right, rows)

        def product() -> Any:
            with torch.inference_mode():
                return torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")

        product()
        _packed[key] = product
    return _packed[key]
