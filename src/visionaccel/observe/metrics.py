"""Metrics of this process's encoders: an observer that counts, and what is read off services when somebody asks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from visionaccel.backends import BreakerReport, DriftReport, EncodeReport, FailureReport, hookimpl
from visionaccel.observe.observers import installed
from visionaccel.observe.tally import Series, Snapshot, Tally, families

if TYPE_CHECKING:  # which tell their observers, and are read by this one
    from visionaccel.service import EncodeService
    from visionaccel.trust import GuardedEncoder

__all__ = ["SERIES", "EncoderMetrics", "MetricsCollector", "metrics_table"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PATCHES = (64.0, 256.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0)
_DRIFT = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_WHO = ("backend", "device")
_STATES = {"closed": 0.0, "half-open": 1.0, "open": 2.0}

SERIES = (
    Series("visionaccel_encode_seconds", "histogram", "Seconds of an encode, without its wait.",
           (*_WHO, "purpose"), _SECONDS),
    Series("visionaccel_queue_seconds", "histogram", "Seconds that the first image of an encode waited.", _WHO,
           _SECONDS),
    Series("visionaccel_processor_seconds", "histogram", "Seconds of the image processor for a prompt.", (), _SECONDS),
    Series("visionaccel_encode_patches", "histogram", "Patches of an encode.", _WHO, _PATCHES),
    Series("visionaccel_part_seconds", "counter", "Seconds by part of an encode.", (*_WHO, "part")),
    Series("visionaccel_patches", "counter", "Patches encoded for requests.", _WHO),
    Series("visionaccel_tokens", "counter", "Embeddings computed for requests.", _WHO),
    Series("visionaccel_bytes", "counter", "Bytes given to devices and got back.", (*_WHO, "direction")),
    Series("visionaccel_failures", "counter", "Attempts that a device failed, by the error's type.", (*_WHO, "kind")),
    Series("visionaccel_failed_items", "counter", "Images that no encoder could encode.", ()),
    Series("visionaccel_fallback_items", "counter", "Images that a fallback encoded.", ()),
    Series("visionaccel_breaker_state", "gauge", "0: a device gets work, 1: it is probed, 2: it gets none.", _WHO,
           merge="max"),
    Series("visionaccel_breaker_openings", "counter", "How often a device was taken out of work.", _WHO),
    Series("visionaccel_drift", "histogram", "1 - the lowest cosine with the reference of a compared encode.",
           (*_WHO, "source"), _DRIFT),
    Series("visionaccel_lowest_cosine", "gauge", "Lowest cosine of the last comparison.", (*_WHO, "source"),
           merge="min"),
    Series("visionaccel_comparisons", "counter", "Comparisons with the reference.", (*_WHO, "source", "outcome")),
    Series("visionaccel_shadow_skipped", "counter", "Answers that were to be compared and were not, for want of time."),
    Series("visionaccel_device_restarts", "counter", "How often a device's process was started anew.", _WHO),
    Series("visionaccel_cache_hits", "counter", "Images whose embeddings were in the cache."),
    Series("visionaccel_cache_bytes", "gauge", "Bytes of embeddings in the cache."),
    Series("visionaccel_cache_evictions", "counter", "Embeddings that left the cache for others."),
    Series("visionaccel_merged_items", "counter", "Images equal to one in the queue, encoded with it."),
    Series("visionaccel_cancelled_items", "counter", "Images that nobody wanted any more before their turn."),
    Series("visionaccel_waiting_items", "gauge", "Images that wait for a device."),
    Series("visionaccel_running_items", "gauge", "Images that devices encode now."),
)  # fmt: skip
"""Every metric; docs/observe.md shows them."""

_PARTS = ("check", "prepare", "transfer_in", "device", "transfer_out", "finish")


def metrics_table() -> str:
    """The metrics as a Markdown table."""
    names = [one.name + ("_total" if one.kind == "counter" else "") for one in SERIES]
    rows = [
        f"| `{name}` | {one.kind} | {', '.join(one.labels)} | {one.help} |"
        for name, one in zip(names, SERIES, strict=True)
    ]
    return "\n".join(["| metric | kind | labels | what it is |", "|---|---|---|---|", *rows, ""])


class EncoderMetrics:
    """Counts what the encoders of this process do.

    Attributes:
        counts_work: Encodes count, and not only what goes wrong: of several workers that all encode the same images,
            one counts them.
    """

    def __init__(self) -> None:
        self._tally = Tally(SERIES)
        self.counts_work = True
        self._services: list[EncodeService] = []
        self._encoders: list[GuardedEncoder] = []
        self._any_service = False
        self._ended: Counter[tuple[str, ...]] = Counter()
        self._reading = threading.Lock()

    @classmethod
    def install(cls) -> EncoderMetrics:
        """Start counting in this process; the same for every caller, and not for a fork of theirs."""
        return installed(cls, cls)

    def watch_encoder(self, encoder: GuardedEncoder) -> None:
        """Show an encoder's counters, until it is closed and read once more."""
        with self._reading:
            self._encoders.append(encoder)
        for stage in encoder.stages:
            opened = stage.encoder_if_open
            if opened is not None:
                device = opened.capabilities.device
                self._tally.set("visionaccel_breaker_state", opened.backend, device, value=_STATES[stage.breaker.state])

    def watch_service(self, service: EncodeService) -> None:
        """Show a service's counters, and those of its encoders, until it is closed and read once more."""
        with self._reading:
            self._any_service = True
            self._services.append(service)
        for encoder in service.encoders:
            self.watch_encoder(encoder)

    def processed(self, seconds: float) -> None:
        """The image processor has run."""
        self._tally.observe("visionaccel_processor_seconds", value=seconds)

    def snapshot(self) -> Snapshot:
        """Everything so far."""
        self._read_watched()
        return self._tally.snapshot()

    @hookimpl
    def visionaccel_encoded(self, report: EncodeReport) -> None:
        """Count an encode."""
        if not self.counts_work:
            return
        tally, who = self._tally, (report.backend, report.device)
        seconds = report.check_seconds + report.prepare_seconds + report.run_seconds + report.finish_seconds
        tally.observe("visionaccel_encode_seconds", *who, report.purpose, value=seconds)
        if report.purpose != "request":
            return
        if report.queue_seconds is not None:
            tally.observe("visionaccel_queue_seconds", *who, value=report.queue_seconds)
        tally.observe("visionaccel_encode_patches", *who, value=report.patches)
        tally.count("visionaccel_patches", *who, amount=report.patches)
        tally.count("visionaccel_tokens", *who, amount=report.tokens)
        tally.count("visionaccel_bytes", *who, "in", amount=report.bytes_in)
        tally.count("visionaccel_bytes", *who, "out", amount=report.bytes_out)
        for part in _PARTS:
            tally.count("visionaccel_part_seconds", *who, part, amount=getattr(report, f"{part}_seconds"))

    @hookimpl
    def visionaccel_failed(self, report: FailureReport) -> None:
        """Count a failed attempt."""
        self._tally.count("visionaccel_failures", report.backend, report.device, report.kind)

    @hookimpl
    def visionaccel_compared(self, report: DriftReport) -> None:
        """Count a comparison."""
        who = (report.backend, report.device, report.source)
        if report.encoded:
            self._tally.observe("visionaccel_drift", *who, value=1.0 - report.lowest_cosine)
            self._tally.set("visionaccel_lowest_cosine", *who, value=report.lowest_cosine)
        outcome = "passed" if report.passed else "failed" if report.encoded else "not encoded"
        self._tally.count("visionaccel_comparisons", *who, outcome)

    @hookimpl
    def visionaccel_breaker(self, report: BreakerReport) -> None:
        """Note a breaker's state."""
        who = (report.backend, report.device)
        self._tally.set("visionaccel_breaker_state", *who, value=_STATES[report.state])
        if report.state == "open":
            self._tally.count("visionaccel_breaker_openings", *who)

    def _read_watched(self) -> None:
        """Read off what is counted elsewhere. What is closed is read once more, and let go."""
        with self._reading:
            served = {id(encoder) for service in self._services for encoder in service.encoders}
            every: list[tuple[Any, Callable[[Any], dict[tuple[str, ...], int]]]]
            every = [(each, partial(_counts_of_encoder, served=id(each) in served)) for each in self._encoders]
            every += [(each, _counts_of_service) for each in self._services]
            ended = [each for each, _ in every if each.closed]  # before their counts are read, which are final then
            now = Counter(self._ended)
            for watched, counts_of in every:
                counts = counts_of(watched)
                now.update(counts)
                if watched in ended:
                    self._ended.update(counts)
            self._encoders = [encoder for encoder in self._encoders if encoder not in ended]
            self._services = [service for service in self._services if service not in ended]
            for (name, *labels), value in now.items():
                self._tally.set(name, *labels, value=value)
            if self._any_service:
                self._read_levels(list(self._services))

    def _read_levels(self, services: Sequence[EncodeService]) -> None:
        counters = [service.counters for service in services]
        held = sum(cache.held for cache in {service.cache for service in services})
        self._tally.set("visionaccel_cache_bytes", value=held)
        self._tally.set("visionaccel_waiting_items", value=sum(each.waiting for each in counters))
        self._tally.set("visionaccel_running_items", value=sum(each.running for each in counters))


def _counts_of_service(service: EncodeService) -> dict[tuple[str, ...], int]:
    """What a service has counted, by a series' name and label values."""
    counters = service.counters
    return {
        ("visionaccel_failed_items",): counters.failed,
        ("visionaccel_cache_hits",): counters.cached,
        ("visionaccel_cache_evictions",): service.cache.evicted,
        ("visionaccel_merged_items",): counters.merged,
        ("visionaccel_cancelled_items",): counters.cancelled,
    }


def _counts_of_encoder(encoder: GuardedEncoder, *, served: bool) -> dict[tuple[str, ...], int]:
    """What an encoder has counted, by a series' name and label values.

    Args:
        encoder: The encoder.
        served: It belongs to a service, which counts the items that failed, those past a deadline included.
    """
    device = encoder.primary.capabilities.device
    return {
        ("visionaccel_failed_items",): 0 if served else encoder.failed_items,
        ("visionaccel_fallback_items",): encoder.fallback_items,
        ("visionaccel_shadow_skipped",): encoder.shadow.skipped if encoder.shadow is not None else 0,
        # The other stages are the first of another chain, or fallbacks.
        ("visionaccel_device_restarts", encoder.primary.backend, device): encoder.stages[0].restarts,
    }


class MetricsCollector(Collector):
    """This process's metrics for a registry of prometheus_client's, for those who use the service from Python.

    `prometheus_client.REGISTRY.register(MetricsCollector(EncoderMetrics.install()))`
    """

    def __init__(self, metrics: EncoderMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """The families, as they are now."""
        return families(SERIES, self._metrics.snapshot())
