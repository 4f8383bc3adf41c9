"""What `bench encode` and `bench placement` measured, as tables and bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from visionaccel_bench.encode.encode_report import ContenderReport, EncodeReport, GridOperations
from visionaccel_bench.encode.placement import ModeAdvice, Placement
from visionaccel_bench.reporting.charts import Bar, draw_bars
from visionaccel_bench.reporting.markup import Content, Html, element, joined, paragraph, table

__all__ = ["advice", "encodes"]

_GIB = 2**30
_DASH = "-"


def encodes(report: EncodeReport) -> Html:
    """Contenders, then each grid with its times and its accuracy."""
    machine = report.machine
    about = f"{report.source}; {machine.processor}, {report.plan.threads} of {machine.cores} cores; {machine.system}"
    contenders = table(
        ("contender", "runs on", "start-up, s", "memory at most, GiB"), map(_contender, report.contenders)
    )
    grids = [part for needs in report.grids for part in _grid(report, needs)]
    notes = [paragraph(note, class_="faint") for note in report.notes]
    return joined([paragraph(about, class_="faint"), contenders, *grids, *notes])


def advice(placements: Sequence[Placement]) -> Html:
    """Whether to offload to each backend, in each mode."""
    rows = [
        (each.label, mode, _answer(found), found.reason)
        for each in placements
        for mode, found in (("in-line", each.inline), ("pipelined", each.pipelined))
    ]
    return joined([element("h4", "Whether to offload"), table(("backend", "mode", "offload", "because"), rows)])


def _answer(found: ModeAdvice) -> str:
    return {True: "yes", False: "no", None: "not known"}[found.offload]


def _contender(each: ContenderReport) -> Sequence[Content]:
    if each.error is not None:
        return each.label, f"not compared: {each.error}", _DASH, _DASH
    about = " (SIMULATED)" if each.simulated else ""
    memory = _DASH if each.peak_bytes is None else f"{each.peak_bytes / _GIB:.2f}"
    runs = f"{each.device or _DASH}, {each.precision or _DASH}{about}; {each.about or ''}"
    return each.label, runs, _seconds(each.startup_seconds), memory


def _grid(report: EncodeReport, needs: GridOperations) -> Iterator[Html]:
    yield element("h4", f"{needs.grid}: {needs.patches} patches, {_operations(needs.operations)}")
    found = [(each, on) for each in report.contenders if (on := each.on(needs.grid)) is not None]
    bars = [
        Bar(each.label, on.median_seconds, f"{_seconds(on.median_seconds)} s", second=each.kind != "backend")
        for each, on in found
        if on.median_seconds is not None
    ]
    if bars:
        yield draw_bars(bars, "median seconds of an encode, less is better; other towers in a paler colour")
    rows: list[Sequence[Content]] = []
    for each, on in found:
        if on.error is not None:
            rows.append((each.label, f"failed: {on.error}", *[_DASH] * 7))
            continue
        accuracy = on.accuracy
        rows.append(
            (
                each.label,
                _seconds(on.median_seconds),
                f"{_seconds(on.least_seconds)} to {_seconds(on.most_seconds)}",
                _DASH if on.patches_per_second is None else f"{on.patches_per_second:.0f}",
                _DASH if on.share_of_peak is None else f"{100 * on.share_of_peak:.0f}",
                _ratio(on.times_stock),
                _ratio(on.times_transformers),
                _DASH if accuracy is None else f"{accuracy.lowest_cosine:.5f}",
                _DASH if accuracy is None else f"{accuracy.relative_error:.1e}",
            )
        )
    columns = (
        "contender", "median, s", "least to most, s", "patches/s", "% of peak", "times vLLM bf16", "times transformers",
        "lowest cosine", "relative error",
    )  # fmt: skip
    yield table(columns, rows, numbers=True)


def _operations(number: int) -> str:
    return f"{number / 1e12:.3g} TFLOP" if number >= 1e11 else f"{number / 1e9:.3g} GFLOP"


def _seconds(value: float | None) -> str:
    return _DASH if value is None else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f}"
