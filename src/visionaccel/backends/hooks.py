"""pluggy hooks: what has many answers. Picking the one backend to run is not among them (see `selection`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pluggy

from visionaccel.backends.spec import VisionBackend
from visionaccel.grid import Grid

__all__ = ["PROJECT", "EncodeReport", "HookSpecs", "hookimpl", "hookspec"]

PROJECT = "visionaccel"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """One finished encode.

    Attributes:
        backend: Name of the backend.
        device: What the session runs on.
        grids: The grids that were encoded.
        patches: Rows in.
        tokens: Rows out.
        check_seconds: Checking patches against grids.
        prepare_seconds: Host tables, casts and packing.
        run_seconds: The backend's own calls.
        finish_seconds: Checking and unpacking what came back.
    """

    backend: str
    device: str
    grids: tuple[Grid, ...]
    patches: int
    tokens: int
    check_seconds: float
    prepare_seconds: float
    run_seconds: float
    finish_seconds: float


class HookSpecs:
    """Hooks that a plug-in module may implement, marked with `visionaccel.backends.hookimpl`."""

    @hookspec
    def visionaccel_backends(self) -> Sequence[type[VisionBackend]]:  # type: ignore[empty-body]
        """Backend classes of this plug-in. Must not touch a device or import a vendor's runtime."""

    @hookspec
    def visionaccel_encoded(self, report: EncodeReport) -> None:
        """Called after each encode, in the thread that encoded. What it raises is logged and has no other effect."""
