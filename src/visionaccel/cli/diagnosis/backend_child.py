"""One backend in a child process: `python -m visionaccel.cli.diagnosis.backend_child FILE LIMIT NAME [SOURCE]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from pydantic import ValidationError

from visionaccel.backends import Finding, ProgramSource, VisionBackend, default_registry
from visionaccel.cli.diagnosis.findings import looked
from visionaccel.core.invalid_values import problems_of
from visionaccel.encoder import open_source
from visionaccel.errors import SettingsError
from visionaccel.isolation import answer_with, as_finding, give_up_after
from visionaccel.settings import load_settings

__all__ = ["main"]


def main(file: str, limit: str, name: str, source: str | None = None) -> None:
    """Look at a backend and write what was found into a file.

    Args:
        file: Where the answer goes.
        limit: Seconds after which nobody waits for it.
        name: The backend's name.
        source: A bundle or checkpoint whose programs to look at too.
    """
    give_up_after(float(limit))
    answer_with(file, list(_findings(name, source)))


def _findings(name: str, source: str | None) -> Iterator[Finding]:
    registry = default_registry()
    entry = registry.entry(name)
    loaded: list[VisionBackend] = []
    problems = _looked("plug-in", lambda: loaded.append(registry.load(name)))
    if problems:
        yield from problems
        return
    (backend,) = loaded
    yield Finding("plug-in", "pass", f"{entry.distribution} {entry.version} loads")
    yield from _looked("devices", lambda: [_devices(backend)])
    yield from _looked("options", lambda: _options(backend))
    yield from _looked("checks", lambda: _checks(backend, source))


def _looked(name: str, look: Callable[[], Sequence[Finding] | None]) -> list[Finding]:
    return [found.finding for found in looked("", name, lambda: look() or ())]


def _devices(backend: VisionBackend) -> Finding:
    devices = ", ".join(map(str, backend.devices()))
    if devices:
        return Finding("devices", "pass", devices)
    return Finding("devices", "failure", "none", "See `visionaccel explain` with a bundle for why.")


def _options(backend: VisionBackend) -> Sequence[Finding]:
    """The options that the environment sets, if they are for this backend."""
    try:
        settings = load_settings()
    except SettingsError:  # the settings have a finding of their own
        return ()
    if settings.backend != backend.name or not settings.options:
        return ()
    try:
        backend.options.model_validate(dict(settings.options))
    except ValidationError as error:
        known = ", ".join(backend.options.model_fields) or "none"
        return [Finding("VISIONACCEL_OPTIONS", "failure", problems_of(error), f"Options it takes: {known}.")]
    return [Finding("VISIONACCEL_OPTIONS", "pass", ", ".join(settings.options))]


def _checks(backend: VisionBackend, source: str | None) -> list[Finding]:
    opened: ProgramSource | None = None if source is None else open_source(source)
    programs = opened.programs(backend.formats) if opened is not None else ()
    return [as_finding(finding) for finding in backend.checks(programs)]


if __name__ == "__main__":
    main(*sys.argv[1:])
