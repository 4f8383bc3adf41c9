"""Counts, levels and distributions in a process's memory, and as plain data that other processes can add up.

prometheus_client's own values live in files as soon as one variable is set for the whole process, which is vLLM's to
decide; so it only writes down what was counted here.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

__all__ = ["Series", "Snapshot", "Tally", "families", "merged", "without_levels"]

Snapshot = dict[str, list[tuple[list[str], Any]]]
"""By a series' name: label values, and a number, or of a distribution the counts of its buckets and its sum."""


@dataclass(frozen=True, slots=True)
class Series:
    """One metric.

    Attributes:
        name: Its name, as Prometheus shows it; a counter's without `_total`.
        kind: A counter only grows, and several processes' are added, as histograms are.
        help: What it is.
        labels: Names of its labels.
        buckets: Upper bounds of a histogram's buckets, without infinity.
        merge: What several processes show of a gauge.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Literal["sum", "max", "min"] = "sum"


class Tally:
    """What a process has counted. Safe to use from several threads.

    Args:
        table: The series that there are.
    """

    def __init__(self, table: Iterable[Series]) -> None:
        self._table = {series.name: series for series in table}
        self._lock = threading.Lock()
        self._numbers: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in self._table}
        self._distributions: dict[str, dict[tuple[str, ...], list[float]]] = {name: {} for name in self._table}

    def count(self, name: str, *labels: str, amount: float = 1.0) -> None:
        """Add to a counter."""
        with self._lock:
            numbers = self._numbers[name]
            numbers[labels] = numbers.get(labels, 0.0) + amount

    def set(self, name: str, *labels: str, value: float) -> None:
        """Set a gauge, or a counter that is kept elsewhere."""
        with self._lock:
            self._numbers[name][labels] = value

    def observe(self, name: str, *labels: str, value: float) -> None:
        """Add a value to a histogram."""
        bounds = self._table[name].buckets
        with self._lock:
            cells = self._distributions[name].get(labels)
            if cells is None:
                cells = self._distributions[name][labels] = [0.0] * (len(bounds) + 2)
            cells[bisect.bisect_left(bounds, value)] += 1
            cells[-1] += value

    def snapshot(self) -> Snapshot:
        """Everything so far, as plain data."""
        with self._lock:
            found: Snapshot = {}
            for name, series in self._table.items():
                values = self._distributions[name] if series.kind == "histogram" else self._numbers[name]
                found[name] = [
                    (list(labels), list(value) if isinstance(value, list) else value)
                    for labels, value in values.items()
                ]
            return found


def merged(table: Iterable[Series], snapshots: Iterable[Snapshot]) -> Snapshot:
    """Several processes' counts as one.

    What a snapshot holds that the table does not know, or not in that form, is left out.
    """
    known = {series.name: series for series in table}
    sums: dict[str, dict[tuple[str, ...], Any]] = {name: {} for name in known}
    for snapshot in snapshots:
        for name, rows in snapshot.items():
            series = known.get(name)
            if series is None:
                continue
            for labels, value in rows:
                key = tuple(labels)
                if len(key) == len(series.labels):
                    before = sums[name].get(key)
                    sums[name][key] = value if before is None else _together(series, before, value)
    return {name: [(list(labels), value) for labels, value in values.items()] for name, values in sums.items()}


def without_levels(table: Iterable[Series], snapshot: Snapshot) -> Snapshot:
    """A snapshot of a process that has ended: what it counted stays, and how things stood does not."""
    levels = {series.name for series in table if series.kind == "gauge"}
    return {name: rows for name, rows in snapshot.items() if name not in levels}


def families(table: Iterable[Series], snapshot: Snapshot) -> Iterator[Metric]:
    """A snapshot as prometheus_client's metric families; series without values are shown, too, by name and meaning."""
    for series in table:
        rows = snapshot.get(series.name, [])
        if series.kind == "histogram":
            histogram = HistogramMetricFamily(series.name, series.help, labels=series.labels)
            for labels, cells in rows:
                *counts, total = cells
                running, buckets = 0.0, []
                for bound, count in zip((*map(repr, series.buckets), "+Inf"), counts, strict=True):
                    running += count
                    buckets.append((bound, running))
                histogram.add_metric(labels, buckets, total)
            yield histogram
        else:
            kind = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
            family = kind(series.name, series.help, labels=series.labels)
            for labels, value in rows:
                family.add_metric(labels, value)
            yield family


def _together(series: Series, one: Any, other: Any) -> Any:
    match series.kind:
        case "counter":
            return one + other
        case "gauge":
            return {"sum": one + other, "max": max(one, other), "min": min(one, other)}[series.merge]
        case "histogram":
            return [a + b for a, b in zip(one, other, strict=True)]
