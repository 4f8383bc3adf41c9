"""What `doctor` found, and the certificate of a bundle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from visionaccel.backends.spec import Status
from visionaccel.bundle import MANIFEST, Certificate, ProgramResult, is_bundle, parse_manifest
from visionaccel.cli.diagnosis import Diagnosis, Found
from visionaccel.errors import BundleError
from visionaccel_bench.reporting.markup import Html, chip, element, html, joined, paragraph, table
from visionaccel_bench.reporting.page import Section

__all__ = ["certificate_section", "doctor_section"]

_COLUMNS = ("", "about", "what", "found", "what to do")


def doctor_section(found: Diagnosis) -> Section:
    """What is amiss, and below it everything."""
    counts: dict[Status, int] = {status: found.count(status) for status in ("failure", "warning", "pass")}
    status: Status = next(status for status, count in counts.items() if count or status == "pass")
    amiss = sorted((each for each in found.findings if each.finding.status != "pass"), key=_severity)
    summary = f"{counts['failure']} failed, {counts['warning']} with a warning, {counts['pass']} passed."
    parts = [_findings(amiss) if amiss else paragraph("Nothing is amiss.")]
    every = element("summary", f"All {len(found.findings)} findings")
    parts.append(element("details", every, _findings(found.findings)))
    return Section("doctor", "Doctor", status, summary, joined(parts))


def certificate_section(source: str) -> Section:
    """The certificate that a bundle holds, as `visionaccel validate` wrote it."""
    key, title = "certificate", "Certificate"
    if not is_bundle(source):
        return Section(key, title, "pass", f"{source} is a checkpoint; only bundles are certified.", html(""))
    try:
        certificate = parse_manifest(Path(source, MANIFEST)).certificate
    except BundleError as error:
        return Section(key, title, "failure", str(error), html(""))
    if certificate is None:
        summary = f"{source} has none: nobody proved its programs. Run `visionaccel validate`."
        return Section(key, title, "warning", summary, html(""))
    images = ", ".join(f"{count} {kind}" for kind, count in certificate.images.items())
    outcome = "passed" if certificate.passed else "FAILED"
    summary = f"{source} compared with the float32 reference, {certificate.created}: {outcome}; images: {images}."
    status: Status = "pass" if certificate.passed else "failure"
    return Section(key, title, status, summary, _certificate(certificate))


def _severity(found: Found) -> int:
    return 0 if found.finding.status == "failure" else 1


def _findings(found: Iterable[Found]) -> Html:
    return table(
        _COLUMNS,
        [
            (chip(each.finding.status), each.about, each.finding.name, each.finding.detail, each.finding.fix)
            for each in found
        ],
        class_="findings",
    )


def _certificate(certificate: Certificate) -> Html:
    columns = ("program", "ran on", "grids", "tokens", "lowest", "1st %", "mean", "threshold", "error", "NaN", "")
    parts = [table(columns, map(_program, certificate.programs), numbers=True)]
    for each in certificate.programs:
        if each.failure is not None:
            parts.append(paragraph(f"{each.program}: {each.failure}"))
    tools = ", ".join(f"{name} {version}" for name, version in certificate.toolchain.items())
    parts.append(paragraph(f"Cosines of tokens; made with {tools}.", class_="faint"))
    return joined(parts)


def _program(found: ProgramResult) -> tuple[Html | str | int, ...]:
    return (
        found.program,
        f"{found.backend}, {found.device}" + (" (SIMULATED)" if found.simulated else ""),
        ", ".join(found.grids),
        found.tokens,
        f"{found.lowest_cosine:.6f}",
        f"{found.first_percentile_cosine:.6f}",
        f"{found.mean_cosine:.6f}",
        f"{found.threshold:g}",
        f"{found.relative_error:.1e}",
        found.nonfinite_rows,
        chip("pass" if found.failure is None else "failure"),
    )
