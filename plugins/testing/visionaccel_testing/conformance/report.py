"""Reports of a backend's conformance: JSON for tables, Markdown for people, an SVG badge for a README."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from visionaccel.backends import Registry
from visionaccel.core.cpu import processor_name
from visionaccel_testing.conformance.check import LEVELS
from visionaccel_testing.conformance.declaration import BackendUnderTest
from visionaccel_testing.conformance.suite import CHECKS, Outcome

Badge = Literal["Gold", "Silver", "Bronze", "none"]

_NEEDED: tuple[tuple[Badge, int], ...] = (("Bronze", 1), ("Silver", 3), ("Gold", 6))
"""The badges, and the level up to which each requires all checks to pass."""

_COLOURS = {"Gold": "#b8860b", "Silver": "#708090", "Bronze": "#a0522d", "none": "#8b0000"}
_TRACES = {"results": {"__all__": {"trace"}}}
_DISTRIBUTIONS = ("numpy", "onnx", "onnxruntime", "openvino", "torch", "transformers")


class ConformanceReport(BaseModel):
    """What the kit found about one backend.

    Attributes:
        backend: Its name, device and options.
        distribution: The distribution that provides it, with its version.
        badge: The best badge that it holds.
        missing: Why it does not hold the next better one; empty for Gold.
        declared: `BackendUnderTest.stated` of each suite with this label.
        results: The outcome of each check that was run, without tracebacks.
        versions: Versions of Python and of the packages that were used.
        machine: Processor and system.
        written: Time of writing, in UTC.
        digest: SHA-256 of all other fields except `written`, as hexadecimal digits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str
    distribution: str
    badge: Badge
    missing: str
    declared: tuple[dict[str, Any], ...]
    results: tuple[Outcome, ...]
    versions: dict[str, str]
    machine: str
    written: str
    digest: str


def badge_of(outcomes: Sequence[Outcome]) -> Badge:
    """Bronze if all checks of levels 0 and 1 pass, Silver if those of 2 and 3 do too, Gold if all do.

    A known failure counts as a failure, and so does a check that was not run.
    """
    return _standing(outcomes)[0]


def write_report(
    label: str, outcomes: Sequence[Outcome], folder: Path, declared: Sequence[Mapping[str, Any]] = ()
) -> ConformanceReport:
    """Write a report as `conformance-NAME.json`, `.md` and `.svg`.

    Args:
        label: Name, device and options of the backend.
        outcomes: The outcomes of the checks.
        folder: The folder to write to; made if it does not exist.
        declared: `BackendUnderTest.stated` of each suite with this label.
    """
    badge, missing = _standing(outcomes)
    stated: dict[str, Any] = {
        "backend": label,
        "distribution": _distribution(re.split(r"[/?]", label)[0]),
        "badge": badge,
        "missing": "; ".join(missing),
        "declared": [dict(each) for each in declared],
        "results": [{k: v for k, v in asdict(outcome).items() if k != "trace"} for outcome in outcomes],
        "versions": _versions(),
        "machine": f"{processor_name()}, {platform.machine()}, {platform.system()}",
    }
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
    written = datetime.now(UTC).isoformat(timespec="seconds")
    report = ConformanceReport.model_validate({**stated, "written": written, "digest": digest})
    folder.mkdir(parents=True, exist_ok=True)
    name = "conformance-" + re.sub(r"[^A-Za-z0-9.=_-]+", "-", label)
    (folder / f"{name}.json").write_text(report.model_dump_json(indent=1, exclude=_TRACES) + "\n")
    (folder / f"{name}.md").write_text(_markdown(report, f"{name}.svg"))
    (folder / f"{name}.svg").write_text(_svg(badge))
    return report


def _standing(outcomes: Sequence[Outcome]) -> tuple[Badge, list[str]]:
    """Return the best badge, and what is missing for the next better one."""
    run = {outcome.check: outcome for outcome in outcomes}
    held: Badge = "none"
    for badge, last in _NEEDED:
        missing = []
        for check in CHECKS:
            outcome = run.get(check.name)
            if check.level > last:
                continue
            if outcome is None:
                missing.append(f"{check.name} was not run")
            elif outcome.status in ("failed", "known failure"):
                missing.append(f"{check.name}: {outcome.detail.splitlines()[0] if outcome.detail else outcome.status}")
        if missing:
            return held, missing
        held = badge
    return held, []


def _distribution(backend: str) -> str:
    entries = (entry for entry in Registry().entries if entry.name == backend)
    return next((f"{entry.distribution} {entry.version}" for entry in entries), "unknown")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "visionaccel": importlib.metadata.version("visionaccel")}
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _markdown(report: ConformanceReport, picture: str) -> str:
    lines = [f"![visionaccel conformance: {report.badge}]({picture})", "", f"# Conformance of {report.backend}", ""]
    lines += [f"{report.distribution} on {report.machine}, {report.written}, digest `{report.digest[:16]}`.", ""]
    eased = []
    for declared in report.declared:
        if declared["tolerances"]:
            eased.append(f"different tolerances in {', '.join(declared['tolerances'])}")
        if declared["speed_floor"] != BackendUnderTest.speed_floor:
            floor = declared["speed_floor"]
            eased.append(f"a least speed of {floor}" if floor else "no least speed")
    if eased:
        lines += [f"Its author declared {' and '.join(eased)}; see `declared` in the JSON.", ""]
    if report.missing:
        lines += [f"For the next badge: {report.missing}.", ""]
    titles = {check.name: check.title for check in CHECKS}
    for level, about in enumerate(LEVELS):
        lines += [f"## Level {level}: {about}", "", "| check | outcome | what is right |", "|---|---|---|"]
        for result in report.results:
            if result.level == level:
                shown: str = result.status
                if result.detail:
                    shown += ": " + " ".join(result.detail.split()).replace("|", "\\|")
                if result.figures:
                    shown += f" ({', '.join(f'{name} {value:g}' for name, value in result.figures.items())})"
                lines.append(f"| {result.check} | {shown} | {titles[result.check]} |")
        lines.append("")
    lines.append(", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".")
    return "\n".join(lines) + "\n"


def _svg(badge: Badge) -> str:
    left, right = 82, 52
    width = left + right
    text = 'font-family="Verdana,sans-serif" font-size="11" fill="#fff" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" '
        f'aria-label="visionaccel: {badge}"><title>visionaccel: {badge}</title>'
        f'<rect width="{left}" height="20" fill="#444"/><rect x="{left}" width="{right}" height="20" '
        f'fill="{_COLOURS[badge]}"/><text x="{left / 2:g}" y="14" {text}>visionaccel</text>'
        f'<text x="{left + right / 2:g}" y="14" {text}>{badge}</text></svg>\n'
    )
