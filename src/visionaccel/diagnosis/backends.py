"""Installed backends: each is loaded and asked in a process of its own."""

from __future__ import annotations

from collections.abc import Iterable

from visionaccel.backends import Finding, Registry
from visionaccel.diagnosis.child_process import ask_child
from visionaccel.diagnosis.findings import Found

__all__ = ["no_backend", "of_backend"]

_CHILD = "visionaccel.diagnosis.backend_child"


def of_backend(name: str, source: str | None, limit: float) -> list[Found]:
    """What a backend has and lacks here.

    Args:
        name: Its name.
        source: A bundle or checkpoint whose programs to look at too; one that opens.
        limit: Seconds that it may take.
    """
    findings = ask_child("plug-in", _CHILD, [name] if source is None else [name, source], limit)
    return [Found(name, finding) for finding in findings]


def no_backend(registry: Registry) -> Iterable[Finding]:
    """That nothing can encode here, if that is so."""
    if all(entry.name == "simulated" for entry in registry.entries):
        fix = "Install one, such as: pip install 'visionaccel[onnxrt]'"
        yield Finding("backends", "failure", "none is installed", fix)
