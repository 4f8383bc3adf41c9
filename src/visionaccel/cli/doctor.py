"""`visionaccel doctor`: what this machine has and lacks, with the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer
from rich.table import Table

from visionaccel.backends.spec import Status
from visionaccel.cli.diagnosis import Diagnosis, diagnose
from visionaccel.cli.diagnosis.diagnosing import LIMIT, VLLM
from visionaccel.cli.output import Json, finite, print_json, results

__all__ = ["doctor"]

_WORDS: Mapping[Status, str] = {"failure": "failed", "warning": "with a warning", "pass": "passed"}
_STYLES: Mapping[Status, str] = {"pass": "green", "warning": "yellow", "failure": "bold red"}


def doctor(
    source: Annotated[
        str | None, typer.Argument(help="Bundle or checkpoint to look at too. Default: VISIONACCEL_BUNDLE, if set.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Look at this backend only. Default: every installed one.")
    ] = None,
    no_vllm: Annotated[bool, typer.Option("--no-vllm", help="Leave vLLM out, which takes seconds to import.")] = False,
    limit: Annotated[
        float,
        typer.Option(
            min=1, max=3600, callback=finite, help="Seconds that a backend may take; vLLM may take twice as long."
        ),
    ] = LIMIT,
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 if anything at all is a failure.")] = False,
    as_json: Json = False,
) -> None:
    """Look at this machine: versions, settings, drivers and libraries of each backend, a bundle, and vLLM.

    Each backend, and vLLM, is looked at in a process of its own: one that crashes or hangs there is a finding.

    Exit status 1 if a backend was named and something that it needs is missing; with --strict, after any failure.
    """
    found = diagnose(source, backend, limit=limit, vllm=not no_vllm)
    if as_json:
        print_json(found.document())
    else:
        _print(found)
    failed = [each.about for each in found.findings if each.finding.status == "failure"]
    if (strict and failed) or (backend and any(about != VLLM for about in failed)):
        raise typer.Exit(1)


def _print(found: Diagnosis) -> None:
    table = Table("about")
    for name in ("what", "status", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for each in found.findings:
        of = each.finding
        table.add_row(each.about, of.name, of.status, of.detail, of.fix, style=_STYLES[of.status])
    results.print(table)
    counts = ", ".join(f"{found.count(status)} {word}" for status, word in _WORDS.items())
    results.print(f"{counts}.")
