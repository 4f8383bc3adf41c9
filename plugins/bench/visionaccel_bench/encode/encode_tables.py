"""An encode benchmark and a placement as tables, for the terminal and the report's page."""

from __future__ import annotations

from collections.abc import Sequence

from visionaccel.cli.output import number
from visionaccel_bench.encode.encode_report import ContenderReport, EncodeReport, GridOperations, GridReport
from visionaccel_bench.encode.placement import Placement
from visionaccel_bench.tables import DASH, Table, seconds

_GIB = 2**30


def contenders_table(report: EncodeReport) -> Table:
    """What each contender runs on, and its start-up and memory."""

    def row(each: ContenderReport) -> tuple[str, ...]:
        if each.error is not None:
            return each.label, f"not compared: {each.error}", DASH, DASH, DASH
        about = " (SIMULATED)" if each.simulated else ""
        runs = f"{each.device or DASH}, {each.precision or DASH}{about}; {each.about or ''}"
        memory = (DASH if size is None else f"{size / _GIB:.2f}" for size in (each.resident_bytes, each.peak_bytes))
        return each.label, runs, seconds(each.startup_seconds), *memory

    columns = ("", "runs on", "start-up, s", "resident, GiB", "peak, GiB")
    return Table(columns, tuple(map(row, report.contenders)), report.source)


def times_table(report: EncodeReport, needs: GridOperations) -> Table:
    """The times of each contender on a grid."""

    def row(label: str, on: GridReport) -> tuple[str, ...]:
        if on.error is not None:
            return label, f"failed: {on.error}", *[DASH] * 5
        return (
            label,
            seconds(on.median_seconds),
            f"{seconds(on.least_seconds)} to {seconds(on.most_seconds)}",
            DASH if on.patches_per_second is None else f"{on.patches_per_second:.0f}",
            DASH if on.share_of_peak is None else f"{100 * on.share_of_peak:.0f}",
            number(on.times_stock),
            number(on.times_transformers),
        )

    columns = ("", "median, s", "least to most, s", "patches/s", "% of peak", "times vLLM bf16", "times transformers")
    rows = tuple(row(each.label, on) for each in report.contenders if (on := each.on(needs.grid)) is not None)
    work = f"{needs.operations / 1e12:.3g} TFLOP" if needs.operations >= 1e11 else f"{needs.operations / 1e9:.3g} GFLOP"
    return Table(columns, rows, f"{needs.grid}: {needs.patches} patches, {work}", "numbers")


def accuracy_table(report: EncodeReport, needs: GridOperations) -> Table:
    """How far each contender is from the reference on a grid; without rows if that is not known of any."""
    rows = tuple(
        (each.label, f"{found.lowest_cosine:.5f}", f"{found.mean_cosine:.5f}", f"{found.relative_error:.1e}")
        for each in report.contenders
        if (on := each.on(needs.grid)) is not None and (found := on.accuracy) is not None
    )
    columns = ("", "lowest cosine", "mean cosine", "relative error")
    return Table(columns, rows, f"{needs.grid}: compared with transformers in float32", "numbers")


def linearity_table(report: EncodeReport) -> Table:
    """Microseconds a patch, from grid to grid."""
    rows = []
    for each in report.contenders:
        if each.grids:
            found = [each.on(grid.grid) for grid in report.grids]
            values = [None if on is None else on.microseconds_per_patch for on in found]
            rows.append((each.label, *(DASH if value is None else f"{value:.0f}" for value in values)))
    shares = (f"{100 * grid.full_attention_share:.1f}" for grid in report.grids)
    rows.append(("full attention, % of operations", *shares))
    columns = ("", *(f"{grid.patches:,}" for grid in report.grids))
    return Table(columns, tuple(rows), "microseconds a patch, by patches", "numbers")


def placement_table(found: Placement) -> Table:
    """What each grid gains by a backend."""
    columns = (
        "", "stock vLLM, s", "offloaded, s", "of the whole host, s", "gain in-line, s", "gain pipelined, s",
    )  # fmt: skip
    rows = tuple(
        (
            grid.grid,
            *map(seconds, (grid.stock_seconds, grid.offloaded_seconds, grid.host_seconds)),
            *(f"{gain:+.3f}" for gain in (grid.inline_gain_seconds, grid.pipelined_gain_seconds)),
        )
        for grid in found.grids
    )
    return Table(columns, rows, found.label, "numbers")


def advice_table(placements: Sequence[Placement]) -> Table:
    """Whether to offload to each backend, in each mode."""
    answers = {True: "yes", False: "no", None: "not known"}
    rows = tuple(
        (each.label, mode, answers[found.offload], found.reason)
        for each in placements
        for mode, found in (("in-line", each.inline), ("pipelined", each.pipelined))
    )
    return Table(("backend", "mode", "offload", "because"), rows, "Whether to offload")


def notes(report: EncodeReport) -> list[str]:
    """The machine's peak, and what a reader must know."""
    peaks = report.machine.peak_operations_per_second
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in peaks.items())
    peak = [f"Peak of this machine's matrix products, {report.plan.threads} threads: {rates}."] if peaks else []
    return [*peak, *report.notes]
