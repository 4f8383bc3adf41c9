"""The log of encode times, on when `VISIONACCEL_TIMING` is set."""

from __future__ import annotations

import json
from typing import Any

from visionaccel.backends import EncodeReport, hookimpl
from visionaccel.core.safe_text import safe_logger
from visionaccel.observe.observers import installed

__all__ = ["TIMING_PREFIX", "TimingLog", "timed_encodes"]

logger = safe_logger(__name__)

TIMING_PREFIX = "visionaccel encode "
"""What a timing line starts with; a JSON object follows."""

_PARTS = {
    "queue": "queue_seconds",
    "check": "check_seconds",
    "host_pre": "prepare_seconds",
    "transfer_in": "transfer_in_seconds",
    "device": "device_seconds",
    "transfer_out": "transfer_out_seconds",
    "host_post": "finish_seconds",
}


class TimingLog:
    """Observer that logs one line for each encode: sizes, milliseconds of each part, and the transfers' bandwidth."""

    @classmethod
    def install(cls) -> None:
        """Start logging in this process; once."""
        installed(cls, cls)

    @hookimpl
    def visionaccel_encoded(self, report: EncodeReport) -> None:
        """Log one encode."""
        seconds = {part: getattr(report, name) for part, name in _PARTS.items()}
        line = {
            "backend": report.backend,
            "device": report.device,
            "purpose": report.purpose,
            "grids": [str(grid) for grid in report.grids],
            "patches": report.patches,
            "tokens": report.tokens,
            "ms": {part: round(1e3 * value, 3) for part, value in seconds.items() if value is not None},
            "bytes_in": report.bytes_in,
            "bytes_out": report.bytes_out,
            "gb_per_s_in": _bandwidth(report.bytes_in, report.transfer_in_seconds),
            "gb_per_s_out": _bandwidth(report.bytes_out, report.transfer_out_seconds),
        }
        logger.info("%s%s", TIMING_PREFIX, json.dumps(line))


def timed_encodes(log: str) -> list[dict[str, Any]]:
    """The encodes of requests that a log tells of, without canaries and shadows, in their order."""
    lines = [json.loads(line.partition(TIMING_PREFIX)[2]) for line in log.splitlines() if TIMING_PREFIX in line]
    return [line for line in lines if line["purpose"] == "request"]


def _bandwidth(size: int, seconds: float) -> float | None:
    """GB/s; None where the session told of no transfer."""
    return round(size / seconds / 1e9, 3) if seconds > 0 else None
