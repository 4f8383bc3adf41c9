"""Ways of doing one thing, timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["medians"]


RUNS = 15


def medians(ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each way, measured in turns so that a busy machine slows all alike.

    Each turn begins with a call that is not measured: the threads of the way before may still be spinning.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            way()
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
