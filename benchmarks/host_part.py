"""The host's part of a split program: patch embedding and window reorder of a 58x74 image in the 7B shape.

Lower bound: 4,292 x 1,176 x 1,280 is 12.9 GFLOP at the peak of a matrix product; the reorder moves 20 MB, which takes
only a millisecond or two. The fastest known way is oneDNN's product with a weight that is already packed, and torch's
gather. It is measured in turns in the same run, and the figure is the ratio to it.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from visionaccel.core.program import Precision
from visionaccel.towers import PatchEmbedding

PATCHES, WIDTH, HIDDEN, MERGED = 58 * 74, 1176, 1280, 4
RUNS = 15


def measure() -> dict[str, float]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((HIDDEN, WIDTH), dtype=np.float32) / 34
    patches = rng.standard_normal((PATCHES, WIDTH), dtype=np.float32)
    order = rng.permutation(PATCHES // MERGED)
    figures: dict[str, float] = {}
    kinds: tuple[tuple[Precision, torch.dtype], ...] = (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    for precision, dtype in kinds:
        given = torch.from_numpy(patches).to(dtype)
        ours = PatchEmbedding(weight, precision, MERGED, use_torch=True)
        plain = PatchEmbedding(weight, precision, MERGED, use_torch=False)
        fastest = _fastest(torch.from_numpy(weight).to(dtype), torch.from_numpy(order))
        ways: dict[str, Callable[[], Any]] = {
            "fastest": lambda given=given, fastest=fastest: fastest(given),  # type: ignore[misc]
            "ours": lambda given=given, ours=ours: ours(given, order),  # type: ignore[misc]
            "numpy": lambda given=given, plain=plain: plain(given, order),  # type: ignore[misc]
        }
        seconds = _medians(ways)
        figures |= {f"{precision}, {name}, ms": 1e3 * median for name, median in seconds.items()}
        figures[f"host part in {precision}, times the fastest way"] = seconds["ours"] / seconds["fastest"]
    return figures


def _fastest(weight: torch.Tensor, order: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PATCHES)

    def run(patches: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            embedded: torch.Tensor = torch.ops.mkldnn._linear_pointwise(patches, packed, None, "none", [], "")
            return embedded.view(len(order), -1).index_select(0, order)

    return run


def _medians(ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median seconds of each way, measured in turns so that a busy machine slows all of them equally.

    Each turn begins with a call that is not measured: threads of the previous way may still be spinning.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            way()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
