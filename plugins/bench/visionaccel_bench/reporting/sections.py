"""The sections of a report: what doctor found, a bundle's certificate, benchmarks, timelines and faults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from visionaccel.backends.spec import Status
from visionaccel.bundle import MANIFEST, Certificate, is_bundle, parse_manifest
from visionaccel.cli.diagnosis import Diagnosis, Found
from visionaccel.errors import BundleError
from visionaccel_bench.benchmark_tables import (
    accuracy_table,
    advice_table,
    concurrency_table,
    contenders_table,
    encode_notes,
    linearity_table,
    load_of,
    placement_table,
    serve_notes,
    serve_table,
    times_table,
)
from visionaccel_bench.encode.encode_report import EncodeReport
from visionaccel_bench.encode.placement import PlacementReport
from visionaccel_bench.faultsuite.cells import FaultSuite, fault_table
from visionaccel_bench.reporting.charts import Bar, draw_bars, draw_timeline
from visionaccel_bench.reporting.documents import Benchmark, read_benchmark, read_faults
from visionaccel_bench.reporting.page import Block, Report, Section, Text, worst
from visionaccel_bench.reporting.trace import Trace, overlap, read_trace
from visionaccel_bench.serve.figures import STALL
from visionaccel_bench.serve.serve_report import Report as ServeReport
from visionaccel_bench.tables import DASH, Table, seconds


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a report is made of besides this machine: a bundle or checkpoint, named benchmarks and traces, faults."""

    source: str | None
    benchmarks: tuple[tuple[str, Benchmark], ...]
    traces: tuple[tuple[str, Trace], ...]
    faults: FaultSuite | None


def read_inputs(
    source: str | None = None, benchmarks: Sequence[Path] = (), traces: Sequence[Path] = (), faults: Path | None = None
) -> Inputs:
    """Read every file.

    Raises:
        ConfigurationError: If one cannot be read.
        InputError: If one is not what it should be.
    """
    return Inputs(
        source,
        tuple((path.name, read_benchmark(path)) for path in benchmarks),
        tuple((path.name, read_trace(path)) for path in traces),
        None if faults is None else read_faults(faults),
    )


def make_report(inputs: Inputs, found: Diagnosis, title: str) -> Report:
    """The report of what was read and of what was found."""
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


def _doctor(found: Diagnosis) -> Section:
    counts = {status: found.count(status) for status in ("failure", "warning", "pass")}
    status = worst([each.finding.status for each in found.findings])
    problems = [each for wanted in ("failure", "warning") for each in found.findings if each.finding.status == wanted]
    summary = f"{counts['failure']} failed, {counts['warning']} with a warning, {counts['pass']} passed."
    first: Block = _findings(problems) if problems else Text("No problems found.")
    everything = _findings(found.findings, f"All {len(found.findings)} findings", folded=True)
    return Section("doctor", "Doctor", status, summary, (first, everything))


def _findings(found: Sequence[Found], title: str = "", *, folded: bool = False) -> Table:
    rows = tuple(
        (each.finding.status, each.about, each.finding.name, each.finding.detail, each.finding.fix or "")
        for each in found
    )
    return Table(("", "about", "what", "found", "what to do"), rows, title, "statuses", folded)


def _certificate(source: str) -> Section:
    def section(status: Status, summary: str, blocks: Sequence[Block] = ()) -> Section:
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
    return section("pass" if certificate.passed else "failure", summary, tuple(_proved(certificate)))


def _proved(certificate: Certificate) -> Iterable[Block]:
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
    yield Table(columns, rows, layout="statuses")
    for each in certificate.programs:
        if each.failure is not None:
            yield Text(f"{each.program}: {each.failure}")
    tools = ", ".join(f"{name} {version}" for name, version in certificate.toolchain.items())
    yield Text(f"Cosines of tokens; made with {tools}.", "remark")


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
            blocks += _servers(benchmark)
            continue
        measured = benchmark.measured if isinstance(benchmark, PlacementReport) else benchmark
        failed = [one.label for one in measured.contenders if one.error or any(grid.error for grid in one.grids)]
        statuses.append("warning" if failed else "pass")
        summary = f"{name}: {len(measured.contenders)} contenders on {len(measured.grids)} grids"
        summaries.append(summary + (f", of which failed: {', '.join(failed)}" if failed else ""))
        blocks += _encodes(measured)
        if isinstance(benchmark, PlacementReport):
            blocks += [placement_table(one) for one in benchmark.placements if one.grids]
            blocks.append(advice_table(benchmark.placements))
    return Section("benchmarks", "Benchmarks", worst(statuses), "; ".join(summaries) + ".", blocks)


def _encodes(report: EncodeReport) -> Iterable[Block]:
    machine = report.machine
    about = f"{report.source}; {machine.processor}, {report.plan.threads} of {machine.cores} cores; {machine.system}"
    yield Text(about, "remark")
    yield contenders_table(report)
    for grid in report.grids:
        found = [(each, on) for each in report.contenders if (on := each.on(grid.grid)) is not None]
        bars = [
            Bar(each.label, on.median_seconds, f"{seconds(on.median_seconds)} s", second=each.kind != "backend")
            for each, on in found
            if on.median_seconds is not None
        ]
        yield times_table(report, grid)
        if bars:
            yield draw_bars(bars, f"{grid.grid}: median seconds of an encode, less is better; peers in a paler colour")
        accuracy = accuracy_table(report, grid)
        if accuracy.rows:
            yield accuracy
    if len(report.grids) > 1:
        yield linearity_table(report)
    yield from (Text(note, "remark") for note in encode_notes(report))


def _servers(report: ServeReport) -> Iterable[Block]:
    yield Text(load_of(report), "remark")
    walls, stalls = [], []
    for name, mode in report.modes.items():
        wall = mode.mixed.wall_seconds
        times = "" if mode.times_bound is None else f", {mode.times_bound:.2f} times"
        bound = None if mode.bound is None else mode.bound.seconds
        walls.append(Bar(name, wall, f"{wall:.2f} s{times}", mark=bound, second=name == "stock"))
        if mode.mixed.stalls is not None:
            stalled = mode.mixed.stalls.seconds
            stalls.append(Bar(name, stalled, f"{stalled:.2f} s", second=name == "stock"))
    if walls:
        yield draw_bars(walls, "wall seconds of text and images together, less is better", "what an ideal server needs")
    if stalls:
        yield draw_bars(stalls, f"seconds of stalls over {1e3 * STALL:.0f} ms in the text streams, less is better")
    yield serve_table(report)
    if report.concurrency is not None:
        yield concurrency_table(report.concurrency)
    yield from (Text(note, "remark") for note in serve_notes(report))


def _timelines(traces: Sequence[tuple[str, Trace]]) -> Section:
    blocks: list[Block] = []
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
        "For every event with its details, open the trace file at ui.perfetto.dev or in chrome://tracing.",
    )
    blocks += [Table(columns, tuple(rows), layout="numbers"), *(Text(note, "remark") for note in notes)]
    return Section("timelines", "Timelines", "pass", "; ".join(summaries) + ".", blocks)


def _faults(suite: FaultSuite) -> Section:
    """The faults that failed first, then the others in their order."""
    rows = sorted(suite.rows, key=lambda row: row.passed)
    passed, lost, wrong = (sum(getattr(row, name) for row in rows) for name in ("passed", "lost", "wrong"))
    times = [row.recovery_seconds for row in rows if row.recovery_seconds is not None]
    recovery = f"; recovery took at most {max(times):.2f} s" if times else ""
    device = ", in a SIMULATED device" if suite.simulated else ""
    summary = (
        f"{passed} of {len(rows)} faults went as they should on {suite.created}{device}; {lost} requests lost, {wrong} "
        f"answers wrong{recovery}."
    )
    return Section("faults", "Faults", "pass" if passed == len(rows) else "failure", summary, (fault_table(rows),))
