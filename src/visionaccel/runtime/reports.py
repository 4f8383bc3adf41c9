"""Tells observers what became of a link of a chain. An observer's fault costs nobody an encode."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from visionaccel.backends import BreakerReport, DriftReport, FailureReport
from visionaccel.backends.containment import tell
from visionaccel.encoder import Encoder
from visionaccel.errors import VisionAccelError
from visionaccel.grid import Grid
from visionaccel.runtime.breaker import BreakerState
from visionaccel.runtime.canary import CanaryResult

__all__ = ["report_breaker", "report_canary", "report_failure"]


def report_failure(encoder: Encoder, error: VisionAccelError, grids: Sequence[Grid], following: str | None) -> None:
    """An attempt failed."""
    device, kind = encoder.capabilities.device, type(error).__name__
    report = FailureReport(encoder.backend, device, tuple(grids), kind, error.message, following)
    tell(partial(encoder.hooks.visionaccel_failed, report=report))


def report_canary(encoder: Encoder, result: CanaryResult) -> None:
    """A canary was encoded."""
    report = DriftReport(
        encoder.backend, encoder.capabilities.device, "canary", result.encoded, result.lowest_cosine, result.limit,
        result.passed, result.seconds,
    )  # fmt: skip
    tell(partial(encoder.hooks.visionaccel_compared, report=report))


def report_breaker(encoder: Encoder, state: BreakerState, reason: str) -> None:
    """A link was disabled, is probed, or works again."""
    report = BreakerReport(encoder.backend, encoder.capabilities.device, state.value, reason)
    tell(partial(encoder.hooks.visionaccel_breaker, report=report))
