"""Benchmarks as tables and notes, for the terminal and the report's page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from visionaccel.cli.output import number
from visionaccel_bench.encode.encode_report import ContenderReport, EncodeReport, GridOperations, GridReport
from visionaccel_bench.encode.placement import Placement
from visionaccel_bench.serve.figures import STALL, Latencies, Stalls
from visionaccel_bench.serve.serve_report import Concurrency, ModeReport
from visionaccel_bench.serve.serve_report import Report as ServeReport
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


def encode_notes(report: EncodeReport) -> list[str]:
    """The machine's peak, and what a reader must know."""
    peaks = report.machine.peak_operations_per_second
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in peaks.items())
    peak = [f"Peak of this machine's matrix products, {report.plan.threads} threads: {rates}."] if peaks else []
    return [*peak, *report.notes]


def load_of(report: ServeReport) -> str:
    """What was sent, and what encoded."""
    plan = report.plan
    device = "unknown device" if report.backend is None else f"backend {report.backend}"
    about = " (SIMULATED device)" if report.simulated else ""
    spaced = f"{plan.gap:g} s apart" if plan.gap else "at once"
    return (
        f"text streams: {plan.streams} of {plan.stream_tokens} tokens; images: {plan.images} of "
        f"{plan.size[0]}x{plan.size[1]}, {spaced}; {device}{about}"
    )


def serve_table(report: ServeReport, title: str = "") -> Table:
    """One column for each server."""
    rows = tuple((name, *map(show, report.modes.values())) for name, show in _ROWS.items())
    return Table(("", *report.modes), rows, title, "numbers")


def concurrency_table(found: Concurrency) -> Table:
    """Whether requests with images gain from being sent at once."""
    rows = [
        (name, *map(number, (gain.sequential_seconds, gain.concurrent_seconds, gain.ratio, gain.bound)))
        for name, gain in found.modes.items()
    ]
    prior = f"prior art, {found.prior_art_requests} requests, other model and device"
    rows.append((prior, "", "", number(found.prior_art_ratio), ""))
    title = f"{found.requests} image requests without text: one after the other in-line, and at once"
    return Table(("", "one by one, s", "at once, s", "times as fast", "an ideal server"), tuple(rows), title, "numbers")


def serve_notes(report: ServeReport) -> list[str]:
    """Where the times of device and decode come from, and what a reader must know."""
    each = report.device.seconds_each
    found = [f"Device: {'unknown' if each is None else f'{each:.3f} s an image'} ({report.device.how})."]
    if report.decode_how is not None:
        found.append(f"Decode: {report.decode_how}; the bound has the least of all modes.")
    return [*found, *report.notes]


def _ttft(found: Latencies | None) -> str:
    spread = found.ttft_seconds if found else None
    return DASH if spread is None else f"{spread.p50:.2f} {spread.p90:.2f} {spread.p99:.2f}"


def _itl(found: Latencies | None) -> str:
    spread = found.itl_seconds if found else None
    if spread is None:
        return DASH
    values = (1e3 * value for value in (spread.p50, spread.p90, spread.p99, spread.max))
    return " ".join(f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in values)


def _stalls(found: Stalls | None) -> str:
    return DASH if found is None else f"{found.seconds:.2f} ({found.number:g}, longest gap {found.longest_seconds:.2f})"


_ROWS: dict[str, Callable[[ModeReport], str]] = {
    "wall, s": lambda mode: number(mode.mixed.wall_seconds),
    "tokens/s": lambda mode: f"{mode.mixed.tokens_per_second:.1f}",
    "image requests/s": lambda mode: number(mode.mixed.image_requests_per_second),
    "image TTFT, s: p50 p90 p99": lambda mode: _ttft(mode.mixed.images),
    "image ITL, ms: p50 p90 p99 max": lambda mode: _itl(mode.mixed.images),
    "text TTFT, s: p50 p90 p99": lambda mode: _ttft(mode.mixed.text),
    "text ITL, ms: p50 p90 p99 max": lambda mode: _itl(mode.mixed.text),
    f"text stalls over {1e3 * STALL:.0f} ms, s": lambda mode: _stalls(mode.mixed.stalls),
    "the same without images, s": lambda mode: _stalls(mode.text_only.stalls),
    "text alone: tokens/s": lambda mode: f"{mode.text_only.tokens_per_second:.1f}",
    "client's own pauses, s": lambda mode: number(mode.mixed.client_pause_seconds),
    "device, s": lambda mode: number(mode.bound.device_seconds if mode.bound else None),
    "decode, s": lambda mode: number(mode.decode_seconds),
    "ideal bound, s": lambda mode: number(mode.bound.seconds if mode.bound else None),
    "times the ideal bound": lambda mode: number(mode.times_bound),
}
