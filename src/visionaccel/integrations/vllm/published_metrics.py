"""Metrics of the processes that encode, shown by the process that serves `/metrics`.

A worker of vLLM cannot send numbers to `/metrics`. A connector can in some releases, but only with a step's output, so
they would not change while there are no requests. So each process that encodes writes its counts into memory that all
of a server's processes share, at most twice a second, and the API server adds them up for each answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.shared_memory import METRICS, Area, SharedMemory, shared_memory
from visionaccel.observe import EncoderMetrics, Snapshot, families, merged, without_levels
from visionaccel.trust import background

_PERIOD = 0.5
_ATTEMPTS = 3
_publishers: dict[int, _Publisher] = {}


def publish() -> EncoderMetrics:
    """Start counting in this process and writing the counts to the server's shared memory; once."""
    metrics = EncoderMetrics.install()
    shared = shared_memory()
    if os.getpid() not in _publishers and shared is not None:
        _publishers.clear()  # this process may be a fork: the parent's is of no use here
        _publishers[os.getpid()] = _Publisher(metrics, shared)
    return metrics


class _Publisher:
    """Writes the counts whenever they have changed, until the process ends."""

    def __init__(self, metrics: EncoderMetrics, shared: SharedMemory) -> None:
        self._metrics, self._shared, self._written, self._said = metrics, shared, b"", ""
        self._area: Area | None = None
        background.start(self._publish)

    def _publish(self) -> float:
        try:
            content = json.dumps(self._metrics.snapshot()).encode()
            if content != self._written:
                self._area = self._area or self._shared.claim(METRICS)
                self._area.append(content)
                self._written = content
        except Exception as error:  # later counts may succeed
            if str(error) != self._said:
                self._said = str(error)
                compat.logger().warning("/metrics lacks recent metrics of process %d: %s", os.getpid(), error)
        return _PERIOD


class PublishedCollector(Collector):
    """Collects what all processes of this server published, including ended ones, so that counters never decrease."""

    def describe(self) -> Iterator[Metric]:
        """Yield no names, so that a program may register the metrics of its process in the same registry."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the families of metrics; they are less than a second old."""
        shared = shared_memory()
        return families(merged(_read(shared) if shared is not None else []))


def _read(shared: SharedMemory) -> Iterator[Snapshot]:
    for area in shared.areas(METRICS):
        for _ in range(_ATTEMPTS):  # a record may be overwritten while it is read, at most twice a second
            content = area.record(area.written - 1)
            if content is not None:
                found: Snapshot = json.loads(content)
                yield without_levels(found) if area.ended else found
                break
