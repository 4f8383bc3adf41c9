"""`visionaccel doctor`: what this machine has and lacks for each installed backend, with the fix."""

from __future__ import annotations

import platform
from typing import Annotated, Any

import typer
from rich.table import Table

from visionaccel import __version__
from visionaccel.backends import Finding, ProgramSource, Registry, default_registry
from visionaccel.cli.output import Json, print_json, results
from visionaccel.cores import choose_cores, process_cores, shown_cores
from visionaccel.errors import VisionAccelError
from visionaccel.opening import open_source
from visionaccel.settings import load_settings

__all__ = ["doctor"]


def doctor(
    source: Annotated[
        str | None, typer.Argument(help="Bundle or checkpoint whose programs to look at too; default: none.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Look at this backend only. Default: every installed one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at this machine for each installed backend: drivers, libraries, settings, artifacts.

    Exit status 1 if a backend was named and something that it needs is missing.
    """
    registry = default_registry()
    opened, findings = _open(source)
    names = [registry.entry(backend).name] if backend else [entry.name for entry in registry.entries]
    for name in names:
        findings += [(name, finding) for finding in _findings(registry, name, opened)]
    if as_json:
        print_json([{"about": about, **_row(finding)} for about, finding in findings])
    else:
        table = Table("about", "what", "status", "found", "what to do")
        styles = {"pass": "green", "warning": "yellow", "failure": "bold red"}
        for about, finding in findings:
            table.add_row(
                about, finding.name, finding.status, finding.detail, finding.fix, style=styles[finding.status]
            )
        results.print(table)
    if backend and any(finding.status == "failure" for _, finding in findings):
        raise typer.Exit(1)


def _open(source: str | None) -> tuple[ProgramSource | None, list[tuple[str, Finding]]]:
    machine = f"Python {platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}"
    findings = [("visionaccel", Finding("versions", "pass", f"visionaccel {__version__}, {machine}"))]
    findings.append(("visionaccel", _cores()))
    if source is None:
        return None, findings
    try:
        opened = open_source(source)
    except VisionAccelError as error:
        findings.append(("visionaccel", Finding(source, "failure", error.message, error.hint or "")))
        return None, findings
    return opened, [*findings, ("visionaccel", Finding(source, "pass", f"family {opened.family}"))]


def _cores() -> Finding:
    """Cores of the CPU that encoders may use here."""
    try:
        chosen = choose_cores(load_settings().cpu_cores).cores
    except VisionAccelError as error:
        return Finding("cores", "failure", error.message, error.hint or "")
    return Finding("cores", "pass", shown_cores(chosen or process_cores()))


def _findings(registry: Registry, name: str, source: ProgramSource | None) -> list[Finding]:
    """What a backend finds; one that is broken is itself a finding."""
    try:
        backend = registry.load(name)
        programs = source.programs(backend.formats) if source is not None else ()
        found = list(backend.checks(programs))
        devices = ", ".join(backend.devices())
    except VisionAccelError as error:
        return [Finding("plug-in", "failure", error.message, error.hint or "")]
    except Exception as error:  # Whatever a vendor's stack raises, the other backends are still to be looked at.
        return [Finding("plug-in", "failure", f"{type(error).__name__}: {error}", "Reinstall it, or tell its authors.")]
    none = Finding("devices", "failure", "none", "See `visionaccel explain` with a bundle for why.")
    return [Finding("devices", "pass", devices) if devices else none, *found]


def _row(finding: Finding) -> dict[str, Any]:
    return {"what": finding.name, "status": finding.status, "found": finding.detail, "fix": finding.fix}
