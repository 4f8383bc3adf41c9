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
    "Counters",
    "EncoderMetrics",
    "MetricsCollector",
    "SERIES",
    "Series",
    "Snapshot",
    "TIMING_PREFIX",
    "TimingLog",
    "TraceLog",
    "families",
    "merged",
    "timed_encodes",
    "without_levels",
]
