"""How long the image processor takes, told to whoever looks: the timing log, the timeline, the metrics."""

from __future__ import annotations

import json
from typing import Any, Self

from visionaccel.core.safe_text import safe_logger
from visionaccel.integrations.vllm.published_metrics import publish
from visionaccel.observe import EncoderMetrics, TraceLog
from visionaccel.settings import Settings

__all__ = ["PROCESSOR_PREFIX", "ProcessorObserver"]

logger = safe_logger(__name__)

PROCESSOR_PREFIX = "visionaccel processor "
"""What a timing line of the processor starts with; a JSON object follows."""


class ProcessorObserver:
    """Looks at the image processor of a process that prepares prompts.

    Args:
        log: Log a line for each prompt with images.
        trace: The timeline, if there is one.
        metrics: The metrics, if they are wanted.
    """

    def __init__(self, log: bool, trace: TraceLog | None, metrics: EncoderMetrics | None) -> None:
        self._log, self._trace, self._metrics = log, trace, metrics

    @classmethod
    def wanted_by(cls, settings: Settings) -> Self | None:
        """The observer that the settings want; None if nobody looks."""
        trace = None if settings.trace is None else TraceLog.install(settings.trace)
        metrics = publish() if settings.metrics else None
        wanted = settings.timing or trace is not None or metrics is not None
        return cls(settings.timing, trace, metrics) if wanted else None

    def processed(self, started: float, seconds: float, result: Any) -> None:
        """Tell of one prompt.

        Args:
            started: When it began, on the clock of `time.monotonic`.
            seconds: How long it took.
            result: vLLM's processed prompt.
        """
        places = result.get("mm_placeholders", {}) if isinstance(result, dict) else {}
        items = {kind: len(ranges) for kind, ranges in places.items() if ranges}
        if not items:
            return
        tokens = sum(int(place.length) for ranges in places.values() for place in ranges)
        if self._metrics is not None:
            self._metrics.processed(seconds)
        what = ", ".join(f"{number} {kind}" for kind, number in items.items())
        if self._trace is not None:
            self._trace.slice("processor", "processor", what, started, seconds, tokens=tokens)
        if self._log:
            line = {"ms": round(1e3 * seconds, 3), "items": items, "tokens": tokens}
            logger.info("%s%s", PROCESSOR_PREFIX, json.dumps(line))
