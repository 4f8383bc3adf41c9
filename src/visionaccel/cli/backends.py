"""What is installed and would run an encoder, and what this machine lacks: `backends`, `explain` and `doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table

from visionaccel.backends import AUTO, Accepted, BackendEntry, Candidate, Registry, contained, default_registry, select
from visionaccel.backends.spec import Status
from visionaccel.cli.diagnosis import LIMIT, VLLM, Diagnosis, diagnose
from visionaccel.cli.output import Backend, Device, Json, finite, print_json, print_table, results
from visionaccel.encoder import open_source
from visionaccel.errors import PluginError
from visionaccel.settings import load_settings

_COUNTED: Mapping[Status, str] = {"failure": "failed", "warning": "with a warning", "pass": "passed"}
_STYLES: Mapping[Status, str] = {"pass": "green", "warning": "yellow", "failure": "bold red"}


def backends(as_json: Json = False) -> None:
    """List the installed backends with their devices and options."""
    registry = default_registry()
    rows = [_installed(registry, entry) for entry in registry.entries]
    if as_json:
        print_json(rows)
        return
    print_table(
        "Installed backends",
        ("backend", "distribution", "formats", "devices", "options"),
        [
            (
                row["name"],
                f"{row['distribution']} {row['version']}",
                ", ".join(row["formats"]),
                row["problem"] or ", ".join(row["devices"]),
                "\n".join(f"{name} (default {about['default']!r})" for name, about in row["options"].items()),
            )
            for row in rows
        ],
    )
    if all(row["only_by_name"] for row in rows):
        results.print("No backend is installed that would be chosen. Try: pip install 'visionaccel[onnxrt]'")


def _installed(registry: Registry, entry: BackendEntry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "formats": [],
        "devices": [],
        "options": {},
        "problem": None,
        "only_by_name": False,
    }
    try:
        backend = registry.load(entry.name)
        row["only_by_name"] = backend.only_by_name
        row["formats"] = sorted(backend.formats)
        row["options"] = {
            name: {"default": field.get_default(call_default_factory=True), "description": field.description}
            for name, field in backend.options.model_fields.items()
        }
        with contained():
            row["devices"] = list(backend.devices())
    except PluginError as error:
        row["problem"] = str(error)
    except Exception as error:  # Listing devices may import a vendor's runtime; one that is broken is a finding.
        row["problem"] = f"its devices cannot be listed: {type(error).__name__}: {error}"
    return row


def explain(
    source: Annotated[str, typer.Argument(help="Bundle folder, checkpoint folder or Hugging Face repository.")],
    backend: Backend = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say which backend would run a vision encoder, and why each other would not.

    Exit status 1 if none would.
    """
    settings = load_settings()
    selection = select(
        default_registry(), open_source(source), backend or settings.backend or AUTO, device or settings.device
    )
    rows = [_verdict(candidate, candidate is selection.chosen) for candidate in selection.candidates]
    if as_json:
        print_json({"requested": selection.requested, "device": selection.device, "candidates": rows})
    else:
        shown = [(row["backend"], row["verdict"], row["why"], row["hint"]) for row in rows]
        print_table(f"Vision encoder of {source}", ("backend", "verdict", "why", "what to do"), shown)
    if selection.chosen is None:
        raise typer.Exit(1)


def _verdict(candidate: Candidate, chosen: bool) -> dict[str, Any]:
    name, verdict = candidate.entry.name, candidate.verdict
    if isinstance(verdict, Accepted):
        outcome = "chosen" if chosen else "accepted"
        return {"backend": name, "verdict": outcome, "score": verdict.score, "why": verdict.notes, "hint": ""}
    return {"backend": name, "verdict": "refused", "score": None, "why": verdict.reason, "hint": verdict.hint}


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

    Each backend, and vLLM, is looked at in its own process: one that crashes or hangs there is a finding.

    Exit status 1 if a backend was named and something that it needs is missing; with --strict, after any failure.
    """
    found = diagnose(source, backend, limit=limit, vllm=not no_vllm)
    if as_json:
        print_json(found.document())
    else:
        _print_diagnosis(found)
    failed = [each.about for each in found.findings if each.finding.status == "failure"]
    if (strict and failed) or (backend and any(about != VLLM for about in failed)):
        raise typer.Exit(1)


def _print_diagnosis(found: Diagnosis) -> None:
    table = Table("about")
    for name in ("what", "status", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for each in found.findings:
        of = each.finding
        table.add_row(each.about, of.name, of.status, of.detail, of.fix, style=_STYLES[of.status])
    results.print(table)
    results.print(", ".join(f"{found.count(status)} {word}" for status, word in _COUNTED.items()) + ".")
