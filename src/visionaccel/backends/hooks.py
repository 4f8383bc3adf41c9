"""Hooks that plug-ins implement, and the reports that observers receive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import pluggy

from visionaccel.backends.spec import VisionBackend
from visionaccel.core.grid import Grid

if TYPE_CHECKING:  # the command line is an extra
    import typer

PROJECT = "visionaccel"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Purpose: TypeAlias = Literal["request", "canary", "shadow"]
"""What an encode is for: the answer to a request, or a check of the device."""


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """One finished encode.

    Times are in seconds. Transfers that a session does not report (see `visionaccel.backends.call_parts`) count as
    computing.

    Attributes:
        backend: Name of the backend.
        device: What the session runs on.
        grids: The grids that were encoded.
        patches: Rows in.
        tokens: Rows out.
        purpose: What it was for.
        started: When it began, on the clock of `time.monotonic`.
        queue_seconds: How long its first item waited for a device; None where there is no queue.
        check_seconds: Checking patches against grids.
        prepare_seconds: Host tables, casts and packing.
        run_seconds: The backend's calls: the two transfers and the device.
        transfer_in_seconds: Bringing inputs to the device, or into its process.
        device_seconds: Computing.
        transfer_out_seconds: Bringing outputs back.
        finish_seconds: Checking and unpacking what came back.
        bytes_in: Bytes of the inputs of all calls.
        bytes_out: Bytes of their outputs.
    """

    backend: str
    device: str
    grids: tuple[Grid, ...]
    patches: int
    tokens: int
    purpose: Purpose
    started: float
    queue_seconds: float | None
    check_seconds: float
    prepare_seconds: float
    run_seconds: float
    transfer_in_seconds: float
    device_seconds: float
    transfer_out_seconds: float
    finish_seconds: float
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class FailureReport:
    """One encode that a device failed.

    Attributes:
        backend: Name of the backend.
        device: What its session runs on.
        grids: What was to be encoded.
        kind: Name of the error's class, such as `OutputError`.
        message: The error's message.
        following: What follows: `retry`, the name of another backend, or None if the items fail.
    """

    backend: str
    device: str
    grids: tuple[Grid, ...]
    kind: str
    message: str
    following: str | None


@dataclass(frozen=True, slots=True)
class DriftReport:
    """A comparison of an encoder with known or computed answers of the reference.

    Attributes:
        backend: Name of the backend.
        device: What its session runs on.
        source: `canary` for golden images, `shadow` for a request that the reference encoded too.
        encoded: Something was compared; otherwise the cosine means nothing.
        lowest_cosine: The lowest cosine of a token; -1 if the encode failed.
        limit: The lowest cosine that passes.
        passed: Whether it passed.
        seconds: How long the comparison took, encodes included.
    """

    backend: str
    device: str
    source: Literal["canary", "shadow"]
    encoded: bool
    lowest_cosine: float
    limit: float
    passed: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class BreakerReport:
    """An encoder's breaker changed its state.

    Attributes:
        backend: Name of the backend.
        device: What its session runs on.
        state: `closed`, `open` or `half-open`.
        reason: Why.
    """

    backend: str
    device: str
    state: str
    reason: str


class HookSpecs:
    """Hooks that a plug-in module may implement, marked with `visionaccel.backends.hookimpl`."""

    @hookspec
    def visionaccel_backends(self) -> Sequence[type[VisionBackend]]:  # type: ignore[empty-body]
        """Backend classes of this plug-in. Must not touch a device or import a vendor's runtime."""

    @hookspec
    def visionaccel_encoded(self, report: EncodeReport) -> None:
        """Called after each encode, in the thread that encoded. What it raises is logged and has no other effect."""

    @hookspec
    def visionaccel_failed(self, report: FailureReport) -> None:
        """Called after each encode that a device failed, in the thread that encoded."""

    @hookspec
    def visionaccel_compared(self, report: DriftReport) -> None:
        """Called after each canary and each shadow encode, in any thread."""

    @hookspec
    def visionaccel_breaker(self, report: BreakerReport) -> None:
        """Called when an encoder's breaker opens, half-opens or closes, in any thread."""

    @hookspec
    def visionaccel_commands(self, app: typer.Typer) -> None:
        """Adds commands to `visionaccel`: `app.command()(function)` or `app.add_typer(group)`.

        Called on the modules of the entry-point group `visionaccel.commands`, for help and for a command that is not
        the core's. Import what is slow inside the commands. If this raises, prints to stdout or adds a name that is
        taken, other commands still work. A callback of `app` itself is refused.
        """
