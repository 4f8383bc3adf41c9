"""Installed backends: each is loaded and asked in a process of its own."""

from __future__ import annotations

from collections.abc import Iterable

from visionaccel.backends import Finding, Registry
from visionaccel.isolation import FindingProcess

__all__ = ["no_backend", "start_backend"]

_CHILD = "visionaccel.cli.diagnosis.backend_child"


def start_backend(name: str, source: str | None, limit: float) -> FindingProcess:
    """Start to look at a backend.

    Args:
        name: Its name.
        source: A bundle or checkpoint whose programs to look at too; one that opens.
        limit: Seconds that it may take.
    """
    return FindingProcess("plug-in", _CHILD, [name] if source is None else [name, source], limit)


def no_backend(registry: Registry) -> Iterable[Finding]:
    """That nothing can encode here, if that is so."""
    if all(entry.name == "simulated" for entry in registry.entries):
        fix = "Install one, such as: pip install 'visionaccel[onnxrt]'"
        yield Finding("backends", "failure", "none is installed", fix)
