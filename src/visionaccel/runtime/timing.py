"""The log of encode times, on when `VISIONACCEL_TIMING` is set."""

from __future__ import annotations

import json
import logging

from visionaccel.backends import EncodeReport, default_registry, hookimpl

__all__ = ["TIMING_PREFIX", "TimingLog"]

logger = logging.getLogger(__name__)

TIMING_PREFIX = "visionaccel encode "
"""What a timing line starts with; a JSON object follows."""


class TimingLog:
    """Observer that logs one line for each encode: sizes, and milliseconds of each part."""

    @classmethod
    def install(cls) -> None:
        """Start logging in this process; once."""
        plugins = default_registry().plugins
        if not plugins.has_plugin(cls.__name__):
            plugins.register(cls(), cls.__name__)

    @hookimpl
    def visionaccel_encoded(self, report: EncodeReport) -> None:
        """Log one encode."""
        parts = ("check", "prepare", "run", "finish")
        milliseconds = {part: round(1e3 * float(getattr(report, f"{part}_seconds")), 3) for part in parts}
        line = {
            "backend": report.backend,
            "device": report.device,
            "grids": [str(grid) for grid in report.grids],
            "patches": report.patches,
            "tokens": report.tokens,
            "ms": milliseconds,
        }
        logger.info("%s%s", TIMING_PREFIX, json.dumps(line))
