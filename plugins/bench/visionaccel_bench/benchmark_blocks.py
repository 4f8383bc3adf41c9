"""What each benchmark shows in the terminal and on the report's page."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from visionaccel_bench.blocks import DASH, Bar, Bars, Block, Table, Text, seconds
from visionaccel_bench.encode.encode_report import ContenderReport, EncodeReport, GridOperations, GridReport
from visionaccel_bench.encode.placement import PlacementReport
from visionaccel_bench.serve.load import STALL
from visionaccel_bench.serve.serve_report import Concurrency, Latencies, ModeReport, Stalls
from visionaccel_bench.serve.serve_report import Report as ServeReport

_GIB = 2**30


def number(value: float | None) -> str:
    """Format a number with two decimals; None as a dash."""
    return "-" if value is None else f"{value:.2f}"


def encode_blocks(report: EncodeReport) -> Iterator[Block]:
    """Show the contenders, their times and accuracy on each grid, and notes."""
    heads = ("", "runs on", "start-up, s", "resident, GiB", "peak, GiB")
    yield Table(heads, tuple(map(_contender_row, report.contenders)), report.source)
    for needs in report.grids:
        found = [(each, on) for each in report.contenders if (on := each.on(needs.grid)) is not None]
        yield _times_table(needs, found)
        bars = [
            Bar(each.label, on.median_seconds, f"{seconds(on.median_seconds)} s", second=each.kind != "backend")
            for each, on in found
            if on.median_seconds is not None
        ]
        if bars:
            yield Bars(bars, f"{needs.grid}: median seconds of an encode, less is better; peers in a paler colour")
        accuracies = tuple(
            (each.label, f"{on.accuracy.lowest_cosine:.5f}", f"{on.accuracy.mean_cosine:.5f}",
             f"{on.accuracy.relative_error:.1e}")
            for each, on in found
            if on.accuracy is not None
        )  # fmt: skip
        if accuracies:
            columns = ("", "lowest cosine", "mean cosine", "relative error")
            yield Table(columns, accuracies, f"{needs.grid}: compared with transformers in float32", "numbers")
    if len(report.grids) > 1:
        yield _linearity_table(report)
    yield from encode_notes(report)


def encode_notes(report: EncodeReport) -> Iterator[Text]:
    """Show the machine's peak, and what a reader must know."""
    peaks = report.machine.peak_operations_per_second
    if peaks:
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {precision}" for precision, rate in peaks.items())
        yield Text(f"Peak of this machine's matrix products, {report.plan.threads} threads: {rates}.", "remark")
    yield from (Text(note, "remark") for note in report.notes)


def placement_blocks(report: PlacementReport) -> Iterator[Block]:
    """Show what offloading to each backend gains, and the advice for each mode."""
    columns = (
        "", "stock vLLM, s", "offloaded, s", "of the whole host, s", "gain in-line, s", "gain pipelined, s",
    )  # fmt: skip
    for each in report.placements:
        rows = tuple(
            (
                grid.grid,
                *map(seconds, (grid.stock_seconds, grid.offloaded_seconds, grid.host_seconds)),
                *(f"{gain:+.3f}" for gain in (grid.inline_gain_seconds, grid.pipelined_gain_seconds)),
            )
            for grid in each.grids
        )
        if rows:
            yield Table(columns, rows, each.label, "numbers")
    answers = {True: "yes", False: "no", None: "not known"}
    advice = tuple(
        (each.label, mode, answers[found.offload], found.reason)
        for each in report.placements
        for mode, found in (("in-line", each.inline), ("pipelined", each.pipelined))
    )
    yield Table(("backend", "mode", "offload", "because"), advice, "Whether to offload")


def serve_blocks(report: ServeReport) -> Iterator[Block]:
    """Show the load, wall seconds and stalls as bars, every figure of each server, and notes."""
    plan = report.plan
    device = "unknown device" if report.backend is None else f"backend {report.backend}"
    about = " (SIMULATED device)" if report.simulated else ""
    spaced = f"{plan.gap:g} s apart" if plan.gap else "at once"
    yield Text(
        f"text streams: {plan.streams} of {plan.stream_tokens} tokens; images: {plan.images} of "
        f"{plan.size[0]}x{plan.size[1]}, {spaced}; {device}{about}",
        "remark",
    )
    walls, stalls = [], []
    for name, mode in report.modes.items():
        wall, bound = mode.mixed.wall_seconds, mode.bound.seconds if mode.bound else None
        times = "" if mode.times_bound is None else f", {mode.times_bound:.2f} times"
        walls.append(Bar(name, wall, f"{wall:.2f} s{times}", mark=bound, second=name == "stock"))
        if mode.mixed.stalls is not None:
            stalled = mode.mixed.stalls.seconds
            stalls.append(Bar(name, stalled, f"{stalled:.2f} s", second=name == "stock"))
    if walls:
        yield Bars(walls, "wall seconds of text and images together, less is better", "what an ideal server needs")
    if stalls:
        yield Bars(stalls, f"seconds of stalls over {1e3 * STALL:.0f} ms in the text streams, less is better")
    rows = tuple((name, *map(show, report.modes.values())) for name, show in _SERVE_ROWS.items())
    yield Table(("", *report.modes), rows, layout="numbers")
    if report.concurrency is not None:
        yield _concurrency_table(report.concurrency)
    each = report.device.seconds_each
    yield Text(f"Device: {'unknown' if each is None else f'{each:.3f} s an image'} ({report.device.how}).", "remark")
    if report.decode_how is not None:
        yield Text(f"Decode: {report.decode_how}; the bound uses the smallest of all modes.", "remark")
    yield from (Text(note, "remark") for note in report.notes)


def _contender_row(each: ContenderReport) -> tuple[str, ...]:
    if each.error is not None:
        return each.label, f"not compared: {each.error}", DASH, DASH, DASH
    about = " (SIMULATED)" if each.simulated else ""
    runs = f"{each.device or DASH}, {each.precision or DASH}{about}; {each.about or ''}"
    memory = (DASH if size is None else f"{size / _GIB:.2f}" for size in (each.resident_bytes, each.peak_bytes))
    return each.label, runs, seconds(each.startup_seconds), *memory


def _times_table(needs: GridOperations, found: list[tuple[ContenderReport, GridReport]]) -> Table:
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
    work = f"{needs.operations / 1e12:.3g} TFLOP" if needs.operations >= 1e11 else f"{needs.operations / 1e9:.3g} GFLOP"
    title = f"{needs.grid}: {needs.patches} patches, {work}"
    return Table(columns, tuple(row(each.label, on) for each, on in found), title, "numbers")


def _linearity_table(report: EncodeReport) -> Table:
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


def _concurrency_table(found: Concurrency) -> Table:
    rows = [
        (name, *map(number, (gain.sequential_seconds, gain.concurrent_seconds, gain.ratio, gain.bound)))
        for name, gain in found.modes.items()
    ]
    prior = f"prior art, {found.prior_art_requests} requests, other model and device"
    rows.append((prior, "", "", number(found.prior_art_ratio), ""))
    title = f"{found.requests} image requests without text: one after the other in-line, and at once"
    return Table(("", "one by one, s", "at once, s", "times as fast", "an ideal server"), tuple(rows), title, "numbers")


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


_SERVE_ROWS: dict[str, Callable[[ModeReport], str]] = {
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
