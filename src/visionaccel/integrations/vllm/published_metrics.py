"""Metrics of the processes that encode, shown by the one that answers `/metrics`.

vLLM has no way for numbers from a worker to its `/metrics`. Those of a connector travel with a step's output in some
releases, and would stand still while no request is there. So each process that encodes writes its counts into memory
that all of a server's processes share, at most once a second, and the API server adds them up when it is asked.
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
    """Start counting in this process, and writing the counts into the server's shared memory; once."""
    metrics = EncoderMetrics.install()
    shared = shared_memory()
    if os.getpid() not in _publishers and shared is not None:
        _publishers.clear()  # those of the process that this one is a fork of
        _publishers[os.getpid()] = _Publisher(metrics, shared)
    return metrics


class _Publisher:
    """Writes the counts whenever they have changed, for as long as this process lives."""

    def __init__(self, metrics: EncoderMetrics, shared: SharedMemory) -> None:
        self._metrics, self._shared, self._written, self._said = metrics, shared, b"", ""
        self._area: Area | None = None
        background.start(self._publish)

    def _publish(self) -> float:
        try:
            self._write()
        except Exception as error:  # what comes later is shown all the same
            if str(error) != self._said:
                self._said = str(error)
                compat.logger().warning("/metrics does not show those of process %d: %s", os.getpid(), error)
        return _PERIOD

    def _write(self) -> None:
        content = json.dumps(self._metrics.snapshot()).encode()
        if content == self._written:
            return
        if self._area is None:
            self._area = self._shared.claim(METRICS)
        self._area.append(content)
        self._written = content


class PublishedCollector(Collector):
    """What every process of this server has published, those that have ended included: counters never go back."""

    def describe(self) -> Iterator[Metric]:
        """No names, so that a program may register the metrics of its process in the same registry."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families, as they were less than a second ago."""
        shared = shared_memory()
        return families(merged(_read(shared) if shared is not None else []))


def _read(shared: SharedMemory) -> Iterator[Snapshot]:
    for area in shared.areas(METRICS):
        for _ in range(_ATTEMPTS):  # the last record but one is overwritten at most twice a second
            content = area.record(area.written - 1)
            if content is not None:
                found: Snapshot = json.loads(content)
                yield without_levels(found) if area.ended else found
                break
