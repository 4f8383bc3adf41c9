"""Metrics of the processes that encode, shown by the one that answers `/metrics`.

vLLM has no way for numbers from a worker to its `/metrics`, and for those of a connector only in some releases. So each
process that encodes writes its counts into the server's private folder, at most once a second, and the API server adds
them up when somebody asks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.board import board
from visionaccel.runtime.metrics import SERIES, EncoderMetrics
from visionaccel.runtime.tally import Snapshot, families, merged, without_levels

__all__ = ["PublishedCollector", "publish"]

_PERIOD = 0.5
_PREFIX = "metrics-"
_publishers: dict[int, _Publisher] = {}


def publish() -> EncoderMetrics:
    """Start counting in this process, and writing the counts into the server's folder; once."""
    metrics = EncoderMetrics.install()
    if os.getpid() not in _publishers and board() is not None:
        _publishers.clear()  # those of the process that this one is a fork of
        _publishers[os.getpid()] = _Publisher(metrics)
    return metrics


class _Publisher:
    """A thread that writes a file whenever the counts have changed."""

    def __init__(self, metrics: EncoderMetrics) -> None:
        self._metrics, self._written = metrics, b""
        self._name = f"{_PREFIX}{os.getpid()}-{time.monotonic_ns()}.json"  # numbers of processes come again
        threading.Thread(target=self._run, name="visionaccel-metrics", daemon=True).start()

    def _run(self) -> None:
        idle, said = threading.Event(), ""
        while True:
            try:
                self._write()
            except Exception as error:  # what comes later is shown all the same
                if str(error) != said:
                    said = str(error)
                    compat.logger().warning("Metrics could not be written for /metrics: %s", error)
            idle.wait(_PERIOD)

    def _write(self) -> None:
        folder = board()
        content = json.dumps(self._metrics.snapshot()).encode()
        if folder is None or content == self._written:
            return
        target = folder / self._name
        partial = target.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(target)
        self._written = content


class PublishedCollector(Collector):
    """What every process of this server has published, those that have ended included: counters never go back."""

    def collect(self) -> Iterator[Metric]:
        """The families, as they were less than a second ago."""
        folder = board()
        return families(SERIES, merged(SERIES, _read(folder) if folder is not None else []))


def _read(folder: Path) -> Iterator[Snapshot]:
    for file in sorted(folder.glob(f"{_PREFIX}*.json")):
        with suppress(OSError, ValueError):
            found: Any = json.loads(file.read_bytes())
            process = file.stem.removeprefix(_PREFIX).partition("-")[0]
            yield found if Path("/proc", process).exists() else without_levels(SERIES, found)
