"""What is seen of encodes: metrics, the timing log and the timeline."""

from visionaccel.observe.metrics import SERIES, EncoderMetrics, MetricsCollector, metrics_table
from visionaccel.observe.tally import Series, Snapshot, Tally, families, merged, without_levels
from visionaccel.observe.timing import TIMING_PREFIX, TimingLog, timed_encodes
from visionaccel.observe.trace import TraceLog

__all__ = [
    "EncoderMetrics",
    "MetricsCollector",
    "SERIES",
    "Series",
    "Snapshot",
    "TIMING_PREFIX",
    "Tally",
    "TimingLog",
    "TraceLog",
    "families",
    "merged",
    "metrics_table",
    "timed_encodes",
    "without_levels",
]
