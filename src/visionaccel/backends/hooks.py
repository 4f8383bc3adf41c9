"""Hooks that plug-ins implement, and the reports that observers receive.

In every report, `backend` is the backend's name, and `device` is the device that its session runs on.
"""

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
        grids: The grids that were encoded.
        patches: Number of input rows.
        tokens: Number of output rows.
        purpose: Why it was encoded.
        started: When it began, on the clock of `time.monotonic`.
        queue_seconds: How long the item waited for a device; None without a queue.
        check_seconds: Checking patches against grids.
        prepare_seconds: Making host tables, casting and packing inputs.
        run_seconds: The backend's calls: both transfers and the computation.
        transfer_in_seconds: Copying inputs to the device, or into its process.
        device_seconds: Computing on the device.
        transfer_out_seconds: Copying outputs back.
        finish_seconds: Checking and unpacking outputs.
        bytes_in: Bytes of the inputs of all calls.
        bytes_out: Bytes of the outputs of all calls.
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
    """One encode that failed on a device.

    Attributes:
        grids: The grids that were to be encoded.
        kind: Name of the error's class, such as `OutputError`.
        message: The error's message.
        following: What happens next: `retry`, the name of the backend that takes over, or None if the items fail.
    """

    backend: str
    device: str
    grids: tuple[Grid, ...]
    kind: str
    message: str
    following: str | None


@dataclass(frozen=True, slots=True)
class DriftReport:
    """A comparison of an encoder's embeddings with the reference's.

    Attributes:
        source: `canary` for golden images, `shadow` for a request that the reference encoded too.
        encoded: Whether anything was compared; otherwise `lowest_cosine` means nothing.
        lowest_cosine: The lowest cosine of a token or deepstack level; -1 if the encode failed.
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
    """A change of the state of an encoder's breaker.

    Attributes:
        state: The new state: `closed`, `open` or `half-open`.
        reason: Why it changed.
    """

    backend: str
    device: str
    state: str
    reason: str


class HookSpecs:
    """Hooks that a plug-in module may implement, marked with `visionaccel.backends.hookimpl`."""

    @hookspec
    def visionaccel_backends(self) -> Sequence[type[VisionBackend]]:  # type: ignore[empty-body]
        """Return this plug-in's backend classes. Must not touch a device or import a vendor's runtime."""

    @hookspec
    def visionaccel_encoded(self, report: EncodeReport) -> None:
        """Called after each encode, in the thread that encoded. An exception is logged and has no other effect."""

    @hookspec
    def visionaccel_failed(self, report: FailureReport) -> None:
        """Called after each encode that failed on a device, in the thread that encoded."""

    @hookspec
    def visionaccel_compared(self, report: DriftReport) -> None:
        """Called after each canary and each shadow encode, in any thread."""

    @hookspec
    def visionaccel_breaker(self, report: BreakerReport) -> None:
        """Called when an encoder's breaker opens, half-opens or closes, in any thread."""

    @hookspec
    def visionaccel_commands(self, app: typer.Typer) -> None:
        """Add commands to `visionaccel`: `app.command()(function)` or `app.add_typer(group)`.

        Called on the modules of the entry-point group `visionaccel.commands`, for `--help` and for commands that the
        core does not have. Import slow modules inside the commands. If this raises, prints to stdout or adds a command
        that exists already, other commands still work. A callback on `app` itself is refused.
        """
