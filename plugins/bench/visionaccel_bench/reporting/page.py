"""The report page: a summary, doctor's findings, a bundle's certificate, benchmarks, timelines and faults.

Text becomes HTML only in the template, where Jinja2 escapes each value and the environment makes it safe to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from visionaccel.backends.spec import Status
from visionaccel.bundle import MANIFEST, is_bundle, parse_manifest
from visionaccel.cli.diagnosis import Diagnosis, Found
from visionaccel.core.safe_text import one_line
from visionaccel.errors import BundleError
from visionaccel_bench.benchmark_blocks import encode_blocks, placement_blocks, serve_blocks
from visionaccel_bench.blocks import DASH, Bars, Block, Picture, Table, Text
from visionaccel_bench.drawing import draw_bars, draw_timeline
from visionaccel_bench.encode.placement import PlacementReport
from visionaccel_bench.faultsuite.cells import FaultSuite, fault_table
from visionaccel_bench.reporting.inputs import Benchmark, Inputs, Trace, overlap
from visionaccel_bench.serve.serve_report import Report as ServeReport

_ORDER: tuple[Status, ...] = ("failure", "warning", "pass")


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page. `key` is its fragment, a plain word; `status` its worst status; `summary` one sentence."""

    key: str
    title: str
    status: Status
    summary: str
    blocks: Sequence[Text | Table | Picture] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """The content of a page. `created` is a time in ISO 8601, `version` that of visionaccel."""

    title: str
    created: str
    version: str
    sections: tuple[Section, ...]

    @property
    def status(self) -> Status:
        """The worst status of all sections."""
        return worst([section.status for section in self.sections])

    def page(self) -> str:
        """Render the whole HTML document."""
        ordered = sorted(self.sections, key=lambda section: _ORDER.index(section.status))
        return environment().get_template("page.html").render(report=self, ordered=ordered)


@cache
def environment() -> Environment:
    """Return the templates' environment: each value is shown as one line of text, shortened if long, and escaped."""
    return Environment(
        loader=PackageLoader("visionaccel_bench.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if hasattr(value, "__html__") else one_line(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def make_report(inputs: Inputs, found: Diagnosis, title: str) -> Report:
    """Make the report of the inputs and of what doctor found."""
    sections: list[Section] = [_doctor(found)]
    if inputs.source is not None:
        sections.append(_certificate(inputs.source))
    if inputs.benchmarks:
        sections.append(_benchmarks(inputs.benchmarks))
    if inputs.traces:
        sections.append(_timelines(inputs.traces))
    if inputs.faults is not None:
        sections.append(_faults(inputs.faults))
    return Report(title, found.created, found.version, tuple(sections))


def worst(statuses: Sequence[Status]) -> Status:
    """Return the worst status, or `pass` for an empty list."""
    return next((status for status in _ORDER if status in statuses), "pass")


def _doctor(found: Diagnosis) -> Section:
    status = worst([each.finding.status for each in found.findings])
    problems = [each for wanted in ("failure", "warning") for each in found.findings if each.finding.status == wanted]
    summary = f"{found.count('failure')} failed, {found.count('warning')} with a warning, {found.count('pass')} passed."
    first = _findings(problems) if problems else Text("No problems found.")
    everything = _findings(found.findings, f"All {len(found.findings)} findings", folded=True)
    return Section("doctor", "Doctor", status, summary, (first, everything))


def _findings(found: Sequence[Found], title: str = "", *, folded: bool = False) -> Table:
    rows = tuple(
        (each.finding.status, each.about, each.finding.name, each.finding.detail, each.finding.fix or "")
        for each in found
    )
    return Table(("", "about", "what", "found", "what to do"), rows, title, "statuses", folded)


def _certificate(source: str) -> Section:
    def section(status: Status, summary: str, blocks: Sequence[Text | Table] = ()) -> Section:
        return Section("certificate", "Certificate", status, summary, blocks)

    if not is_bundle(source):
        return section("pass", f"{source} is a checkpoint; only bundles are certified.")
    try:
        certificate = parse_manifest(Path(source, MANIFEST)).certificate
    except BundleError as error:
        return section("failure", str(error))
    if certificate is None:
        return section("warning", f"{source} is not certified. Run `visionaccel validate`.")
    images = ", ".join(f"{count} {kind}" for kind, count in certificate.images.items())
    outcome = "passed" if certificate.passed else "FAILED"
    reference = "the float32 reference" if certificate.independent else "visionaccel's own tower in float32"
    summary = f"{source} compared with {reference}, {certificate.created}: {outcome}; images: {images}."
    columns = ("", "program", "ran on", "grids", "tokens", "lowest", "1st %", "mean", "threshold", "error", "NaN")
    rows = tuple(
        (
            "pass" if each.failure is None else "failure",
            each.program,
            f"{each.backend}, {each.device}" + (" (SIMULATED)" if each.simulated else ""),
            ", ".join(each.grids),
            str(each.tokens),
            f"{each.lowest_cosine:.6f}",
            f"{each.first_percentile_cosine:.6f}",
            f"{each.mean_cosine:.6f}",
            f"{each.threshold:g}",
            f"{each.relative_error:.1e}",
            str(each.nonfinite_rows),
        )
        for each in certificate.programs
    )
    failures = (Text(f"{each.program}: {each.failure}") for each in certificate.programs if each.failure is not None)
    tools = ", ".join(f"{name} {version}" for name, version in certificate.toolchain.items())
    blocks: tuple[Text | Table, ...]
    blocks = (Table(columns, rows, layout="statuses"), *failures, Text(f"Token cosines; made with {tools}.", "remark"))
    return section("pass" if certificate.passed else "failure", summary, blocks)


def _benchmarks(benchmarks: Sequence[tuple[str, Benchmark]]) -> Section:
    blocks: list[Block] = []
    statuses: list[Status] = []
    summaries = []
    for name, benchmark in benchmarks:
        blocks.append(Text(name, "heading"))
        if isinstance(benchmark, ServeReport):
            walls = ", ".join(f"{mode} {each.mixed.wall_seconds:.2f} s" for mode, each in benchmark.modes.items())
            device = " (SIMULATED device)" if benchmark.simulated else ""
            summaries.append(f"{name}: text and images together took {walls}{device}")
            blocks += serve_blocks(benchmark)
            continue
        measured = benchmark.measured if isinstance(benchmark, PlacementReport) else benchmark
        failed = [one.label for one in measured.contenders if one.error or any(grid.error for grid in one.grids)]
        statuses.append("warning" if failed else "pass")
        summary = f"{name}: {len(measured.contenders)} contenders on {len(measured.grids)} grids"
        summaries.append(summary + (f", of which failed: {', '.join(failed)}" if failed else ""))
        machine = measured.machine
        cores = f"{measured.plan.threads} of {machine.cores} cores"
        blocks.append(Text(f"{measured.source}; {machine.processor}, {cores}; {machine.system}", "remark"))
        blocks += encode_blocks(measured)
        if isinstance(benchmark, PlacementReport):
            blocks += placement_blocks(benchmark)
    drawn = [draw_bars(block) if isinstance(block, Bars) else block for block in blocks]
    return Section("benchmarks", "Benchmarks", worst(statuses), "; ".join(summaries) + ".", drawn)


def _timelines(traces: Sequence[tuple[str, Trace]]) -> Section:
    blocks: list[Text | Table | Picture] = []
    rows, summaries = [], []
    for name, trace in traces:
        found = overlap(trace.lanes)
        share = DASH if found.share is None else f"{found.share:.1%}"
        times = (f"{each:.3f} s" for each in (found.device, found.decode, found.both))
        rows.append((name, share, *times, str(len(trace.events))))
        summaries.append(
            f"{name}: no device computed"
            if found.share is None
            else f"{name}: decode steps ran during {share} of the device's time"
        )
        blocks += [Text(name, "heading"), draw_timeline(trace)]
    columns = ("", "of the device's time, decode steps ran", "a device computed", "decode steps ran", "both", "events")
    notes = (
        "Work of one kind in several threads at once counts once. The host's part of an encode is not the device's.",
        "To look at single events and their details, open the trace file at ui.perfetto.dev or in chrome://tracing.",
    )
    blocks += [Table(columns, tuple(rows), layout="numbers"), *(Text(note, "remark") for note in notes)]
    return Section("timelines", "Timelines", "pass", "; ".join(summaries) + ".", blocks)


def _faults(suite: FaultSuite) -> Section:
    rows = sorted(suite.rows, key=lambda row: row.passed)  # those that failed first
    passed, lost, wrong = (sum(getattr(row, name) for row in rows) for name in ("passed", "lost", "wrong"))
    times = [row.recovery_seconds for row in rows if row.recovery_seconds is not None]
    recovery = f"; recovery took at most {max(times):.2f} s" if times else ""
    device = ", in a SIMULATED device" if suite.simulated else ""
    summary = (
        f"{passed} of {len(rows)} faults were handled correctly on {suite.created}{device}; {lost} requests lost, "
        f"{wrong} answers wrong{recovery}."
    )
    return Section("faults", "Faults", "pass" if passed == len(rows) else "failure", summary, (fault_table(rows),))
