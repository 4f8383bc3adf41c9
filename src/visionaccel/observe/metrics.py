"""Metrics of this process's encoders: an observer counts, and a snapshot also reads the services' own counters.

Counts are plain data: merged snapshots of several processes equal what one process would have counted.
prometheus_client would keep them in files if PROMETHEUS_MULTIPROC_DIR is set, as vLLM may do.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from visionaccel.backends import BreakerReport, DriftReport, EncodeReport, FailureReport, hookimpl
from visionaccel.observe.observers import installed

if TYPE_CHECKING:  # they import this package
    from visionaccel.service import EncodeService
    from visionaccel.trust import GuardedEncoder

_Counts: TypeAlias = Counter[tuple[str, ...]]
Snapshot: TypeAlias = dict[str, list[tuple[list[str], Any]]]
"""For each series, by name: label values, and a number, or for a histogram the buckets' counts and the sum."""


@dataclass(frozen=True, slots=True)
class Series:
    """One metric. Counters and histograms of several processes are added."""

    name: str  #: The name in Prometheus; for a counter without `_total`.
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()  #: The names of its labels.
    buckets: tuple[float, ...] = ()  #: Upper bounds of a histogram's buckets, without infinity.
    merge: Literal["sum", "max", "min"] = "sum"  #: How the gauges of several processes are merged.


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PATCHES = (64.0, 256.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0)
_DRIFT = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_WHO = ("backend", "device")
_STATES = {"closed": 0.0, "half-open": 1.0, "open": 2.0}

SERIES = (
    Series("visionaccel_encode_seconds", "histogram", "Seconds of an encode, without its time in the queue.",
           (*_WHO, "purpose"), _SECONDS),
    Series("visionaccel_queue_seconds", "histogram", "Seconds that the first image of an encode waited.", _WHO,
           _SECONDS),
    Series("visionaccel_processor_seconds", "histogram", "Seconds of the image processor for a prompt.", (), _SECONDS),
    Series("visionaccel_encode_patches", "histogram", "Patches of an encode.", _WHO, _PATCHES),
    Series("visionaccel_part_seconds", "counter", "Seconds by part of an encode.", (*_WHO, "part")),
    Series("visionaccel_patches", "counter", "Patches encoded for requests.", _WHO),
    Series("visionaccel_tokens", "counter", "Embeddings computed for requests.", _WHO),
    Series("visionaccel_bytes", "counter", "Bytes sent to devices and received from them.", (*_WHO, "direction")),
    Series("visionaccel_failures", "counter", "Failed attempts of a device, by error type.", (*_WHO, "kind")),
    Series("visionaccel_failed_items", "counter", "Images that no encoder could encode.", ()),
    Series("visionaccel_fallback_items", "counter", "Images that a fallback encoded.", ()),
    Series("visionaccel_breaker_state", "gauge", "0: the device is enabled, 1: it is probed, 2: it is disabled.", _WHO,
           merge="max"),
    Series("visionaccel_breaker_openings", "counter", "How often a device was disabled.", _WHO),
    Series("visionaccel_drift", "histogram", "1 minus the lowest cosine with the reference in a compared encode.",
           (*_WHO, "source"), _DRIFT),
    Series("visionaccel_lowest_cosine", "gauge", "Lowest cosine of the last comparison.", (*_WHO, "source"),
           merge="min"),
    Series("visionaccel_comparisons", "counter", "Comparisons with the reference.", (*_WHO, "source", "outcome")),
    Series("visionaccel_shadow_skipped", "counter", "Answers that the shadow had no time to compare."),
    Series("visionaccel_device_restarts", "counter", "How often a device's process was restarted.", _WHO),
    Series("visionaccel_cache_hits", "counter", "Images whose embeddings were in the cache."),
    Series("visionaccel_cache_bytes", "gauge", "Bytes of embeddings in the cache."),
    Series("visionaccel_cache_evictions", "counter", "Embeddings that were evicted from the cache."),
    Series("visionaccel_merged_items", "counter", "Images merged with an identical one in the service."),
    Series("visionaccel_cancelled_items", "counter", "Images that were cancelled while they waited."),
    Series("visionaccel_waiting_items", "gauge", "Images that wait for a device."),
    Series("visionaccel_running_items", "gauge", "Images that are being encoded now."),
)  # fmt: skip
"""Every metric, as docs/observe.md lists them."""

_BY_NAME = {series.name: series for series in SERIES}
_PARTS = ("check", "prepare", "transfer_in", "device", "transfer_out", "finish")


class Counters:
    """The values of `SERIES` in one process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[str, dict[tuple[str, ...], Any]] = {name: {} for name in _BY_NAME}

    def count(self, name: str, *labels: str, amount: float = 1.0) -> None:
        """Add to a counter."""
        with self._lock:
            cells = self._cells[name]
            cells[labels] = cells.get(labels, 0.0) + amount

    def set(self, name: str, *labels: str, value: float) -> None:
        """Set a gauge, or a counter whose value is kept elsewhere."""
        with self._lock:
            self._cells[name][labels] = value

    def observe(self, name: str, *labels: str, value: float) -> None:
        """Add a value to a histogram."""
        bounds = _BY_NAME[name].buckets
        with self._lock:
            cell = self._cells[name].setdefault(labels, [0.0] * (len(bounds) + 2))
            cell[bisect.bisect_left(bounds, value)] += 1
            cell[-1] += value

    def snapshot(self) -> Snapshot:
        """Return all values so far, as plain data."""
        with self._lock:
            return {
                name: [(list(labels), list(cell) if isinstance(cell, list) else cell) for labels, cell in cells.items()]
                for name, cells in self._cells.items()
            }


class EncoderMetrics:
    """Counts what the encoders of this process do.

    Attributes:
        counts_work: Count encodes, and not only failures. If several workers encode the same images, only one of them
            counts the encodes.
    """

    def __init__(self) -> None:
        self._counters, self.counts_work = Counters(), True
        self._watched: dict[Any, Callable[[Any], _Counts]] = {}
        self._ended: _Counts = Counter()
        self._reading = threading.Lock()

    @classmethod
    def install(cls) -> EncoderMetrics:
        """Start counting in this process. Every caller gets the same object; a forked process gets a new one."""
        return installed(cls, cls)

    def watch_encoder(self, encoder: GuardedEncoder) -> None:
        """Include an encoder's counters, which stay after it is closed."""
        self._watch(encoder, [encoder], _counts_of_encoder)

    def watch_service(self, service: EncodeService) -> None:
        """Include the counters of a service and its encoders, which stay after it is closed."""
        self._watch(service, service.encoders, _counts_of_service)

    def processed(self, seconds: float) -> None:
        """Record the seconds that the image processor took for a prompt."""
        self._counters.observe("visionaccel_processor_seconds", value=seconds)

    def snapshot(self) -> Snapshot:
        """Return all values so far, as plain data."""
        with self._reading:
            counts = self._ended.copy()
            for watched, counts_of in list(self._watched.items()):
                closed = watched.closed  # read this first: if it is closed, its counts are final, and its gauges 0
                found = counts_of(watched)
                counts.update(found)
                if closed:
                    self._ended.update(found)
                    del self._watched[watched]
            if ("visionaccel_cache_bytes",) in counts:  # there has been a service; several may share a cache
                services = [watched for watched, of in self._watched.items() if of is _counts_of_service]
                counts["visionaccel_cache_bytes",] = sum(cache.held for cache in {each.cache for each in services})
            for (name, *labels), value in counts.items():
                self._counters.set(name, *labels, value=value)
            return self._counters.snapshot()

    @hookimpl
    def visionaccel_encoded(self, report: EncodeReport) -> None:
        """Count an encode."""
        if not self.counts_work:
            return
        counters, who = self._counters, (report.backend, report.device)
        seconds = report.check_seconds + report.prepare_seconds + report.run_seconds + report.finish_seconds
        counters.observe("visionaccel_encode_seconds", *who, report.purpose, value=seconds)
        if report.purpose != "request":
            return
        if report.queue_seconds is not None:
            counters.observe("visionaccel_queue_seconds", *who, value=report.queue_seconds)
        counters.observe("visionaccel_encode_patches", *who, value=report.patches)
        counters.count("visionaccel_patches", *who, amount=report.patches)
        counters.count("visionaccel_tokens", *who, amount=report.tokens)
        counters.count("visionaccel_bytes", *who, "in", amount=report.bytes_in)
        counters.count("visionaccel_bytes", *who, "out", amount=report.bytes_out)
        for part in _PARTS:
            counters.count("visionaccel_part_seconds", *who, part, amount=getattr(report, f"{part}_seconds"))

    @hookimpl
    def visionaccel_failed(self, report: FailureReport) -> None:
        """Count a failed attempt."""
        self._counters.count("visionaccel_failures", report.backend, report.device, report.kind)

    @hookimpl
    def visionaccel_compared(self, report: DriftReport) -> None:
        """Count a comparison."""
        who = (report.backend, report.device, report.source)
        if report.encoded:
            self._counters.observe("visionaccel_drift", *who, value=1.0 - report.lowest_cosine)
            self._counters.set("visionaccel_lowest_cosine", *who, value=report.lowest_cosine)
        outcome = "passed" if report.passed else "failed" if report.encoded else "not encoded"
        self._counters.count("visionaccel_comparisons", *who, outcome)

    @hookimpl
    def visionaccel_breaker(self, report: BreakerReport) -> None:
        """Record a breaker's state."""
        who = (report.backend, report.device)
        self._counters.set("visionaccel_breaker_state", *who, value=_STATES[report.state])
        if report.state == "open":
            self._counters.count("visionaccel_breaker_openings", *who)

    def _watch(self, watched: Any, encoders: Iterable[GuardedEncoder], counts_of: Callable[[Any], _Counts]) -> None:
        with self._reading:
            self._watched[watched] = counts_of
        for link in {link for encoder in encoders for link in encoder.links}:
            opened = link.encoder_if_open
            if opened is not None:
                who = opened.backend, opened.capabilities.device
                self._counters.set("visionaccel_breaker_state", *who, value=_STATES[link.breaker.state])


def _counts_of_service(service: EncodeService) -> _Counts:
    """Return the counters of a service and its encoders, by series name and label values."""
    counters = service.counters
    counts: _Counts = Counter({
        ("visionaccel_failed_items",): counters.failed,
        ("visionaccel_cache_hits",): counters.cached,
        ("visionaccel_cache_evictions",): service.cache.evicted,
        ("visionaccel_cache_bytes",): 0,
        ("visionaccel_merged_items",): counters.merged,
        ("visionaccel_cancelled_items",): counters.cancelled,
        ("visionaccel_waiting_items",): counters.waiting,
        ("visionaccel_running_items",): counters.running,
    })  # fmt: skip
    for encoder in service.encoders:
        counts.update(_counts_of_chain(encoder))
    return counts


def _counts_of_encoder(encoder: GuardedEncoder) -> _Counts:
    """Return the counters of an encoder without a service."""
    return Counter({("visionaccel_failed_items",): encoder.failed_items, **_counts_of_chain(encoder)})


def _counts_of_chain(encoder: GuardedEncoder) -> dict[tuple[str, ...], int]:
    device = encoder.primary.capabilities.device
    return {
        ("visionaccel_fallback_items",): encoder.fallback_items,
        ("visionaccel_shadow_skipped",): encoder.shadow.skipped if encoder.shadow is not None else 0,
        # Each other link is a fallback, or the first of a different chain.
        ("visionaccel_device_restarts", encoder.primary.backend, device): encoder.links[0].restarts,
    }


class MetricsCollector(Collector):
    """This process's metrics as a prometheus_client collector, for programs that use the service from Python.

    `prometheus_client.REGISTRY.register(MetricsCollector(EncoderMetrics.install()))`
    """

    def __init__(self, metrics: EncoderMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families with their current values."""
        return families(self._metrics.snapshot())


def merged(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Merge the snapshots of several processes, without series that are unknown or have different labels."""
    sums: dict[str, dict[tuple[str, ...], Any]] = {name: {} for name in _BY_NAME}
    for snapshot in snapshots:
        for name in sums.keys() & snapshot.keys():
            series, cells = _BY_NAME[name], sums[name]
            for labels, value in snapshot[name]:
                key = tuple(labels)
                if len(key) == len(series.labels):
                    cells[key] = _together(series, cells[key], value) if key in cells else value
    return {name: [(list(labels), value) for labels, value in cells.items()] for name, cells in sums.items()}


def without_levels(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot without its gauges, as for a process that has ended."""
    return {name: rows for name, rows in snapshot.items() if name in _BY_NAME and _BY_NAME[name].kind != "gauge"}


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield a snapshot as prometheus_client's metric families, including those without values."""
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    for series in SERIES:
        family = kinds[series.kind](series.name, series.help, labels=series.labels)
        for labels, value in snapshot.get(series.name, []):
            if series.kind == "histogram":
                bounds, (*counts, total) = [*map(repr, series.buckets), "+Inf"], value
                family.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total)
            else:
                family.add_metric(labels, value)
        yield family


def _together(series: Series, one: Any, other: Any) -> Any:
    if series.kind == "histogram":
        return [a + b for a, b in zip(one, other, strict=True)]
    return {"sum": one + other, "max": max(one, other), "min": min(one, other)}[series.merge]
