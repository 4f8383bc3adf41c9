"""Commands that list the installed backends and explain the choice: `backends` and `explain`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from visionaccel.backends import AUTO, Accepted, BackendEntry, Candidate, Registry, contained, default_registry, select
from visionaccel.cli.models import model_of
from visionaccel.cli.output import Backend, Device, Json, print_details, print_json, print_table, results
from visionaccel.encoder import open_source
from visionaccel.errors import PluginError
from visionaccel.settings import load_settings


def backends(as_json: Json = False) -> None:
    """List the installed backends with their devices and options."""
    registry = default_registry()
    rows = [_installed(registry, entry) for entry in registry.entries]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        options = [f"{name} (default {about['default']!r})" for name, about in row["options"].items()]
        details = {
            "distribution": f"{row['distribution']} {row['version']}",
            "formats": ", ".join(row["formats"]),
            "devices": row["problem"] or ", ".join(row["devices"]) or "none",
            "options": ", ".join(options),
        }
        print_details(f"Backend {row['name']}", details)
    if all(row["only_by_name"] for row in rows):
        results.print("No backend is installed that `auto` would choose. Try: pip install 'visionaccel[onnxrt]'")


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
    except Exception as error:  # listing devices may import a vendor's runtime, which may be broken
        row["problem"] = f"its devices cannot be listed: {type(error).__name__}: {error}"
    return row


def explain(
    source: Annotated[str, typer.Argument(help="Bundle folder, checkpoint folder or Hugging Face repository.")],
    backend: Backend = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show a vision encoder's family, which backend would run it, why the others would not, and if vLLM can serve it.

    Exit status 1 if no backend would.
    """
    settings, opened = load_settings(), open_source(source)
    selection = select(default_registry(), opened, backend or settings.backend or AUTO, device or settings.device)
    model = model_of(opened.tower)
    rows = [_verdict(candidate, candidate is selection.chosen) for candidate in selection.candidates]
    if as_json:
        asked = {"requested": selection.requested, "device": selection.device}
        named = {"family": model.family, "architecture": model.architecture, "vllm": list(model.modes)}
        print_json({**named, **asked, "candidates": rows})
    else:
        print_table(
            f"Vision encoder of {source}, family {model.family}",
            ("backend", "verdict", "why, and what to do"),
            [(row["backend"], row["verdict"], f"{row['why']}\n{row['hint']}".rstrip()) for row in rows],
        )
        results.print(f"{model.in_vllm}.")
    if selection.chosen is None:
        raise typer.Exit(1)


def _verdict(candidate: Candidate, chosen: bool) -> dict[str, Any]:
    name, verdict = candidate.entry.name, candidate.verdict
    if isinstance(verdict, Accepted):
        outcome = "chosen" if chosen else "accepted"
        return {"backend": name, "verdict": outcome, "score": verdict.score, "why": verdict.notes, "hint": ""}
    return {"backend": name, "verdict": "refused", "score": None, "why": verdict.reason, "hint": verdict.hint}
