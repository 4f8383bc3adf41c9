"""Observes encodes: metrics, the timing log and the timeline."""

from visionaccel.observe.metrics import (
    SERIES,
    Counters,
    EncoderMetrics,
    MetricsCollector,
    Series,
    Snapshot,
    families,
    merged,
    without_levels,
)
from visionaccel.observe.observers import TIMING_PREFIX, TimingLog, TraceLog, timed_encodes

__all__ = [
    "SERIES", "TIMING_PREFIX", "Counters", "EncoderMetrics", "MetricsCollector", "Series", "Snapshot", "TimingLog",
    "TraceLog", "families", "merged", "timed_encodes", "without_levels",
]  # fmt: skip
