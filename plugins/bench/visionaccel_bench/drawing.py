"""Pictures by matplotlib without a display: plots of benchmarks as PNG files, and SVG pictures for the page."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel.core.safe_text import one_line
from visionaccel.errors import ConfigurationError
from visionaccel_bench.blocks import Bars, Picture
from visionaccel_bench.encode.encode_report import EncodeReport
from visionaccel_bench.reporting.inputs import CATEGORIES, OTHER, Event, Trace
from visionaccel_bench.serve.load import STALL, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = "osD^vP*X<>"

_TOKEN, _STALLED, _WAITING, _ANSWERING, _PAUSED = "#4c72b0", "#c44e52", "#d0d0d0", "#55a868", "#f6efd5"
_LEGEND = {
    "text token": _TOKEN,
    f"text stalls over {1e3 * STALL:.0f} ms": _STALLED,
    "image waits for its first token": _WAITING,
    "image answered": _ANSWERING,
    "client itself paused": _PAUSED,
}
_WIDTH, _ROW, _FRAME = 11.0, 0.22, 0.7
"""Inches: a picture's width, the height of a timeline's row, and the rest of a lane's height."""

_COLOURS = {
    "ink": "#1d232b", "edge": "#d9dee4", "failure": "#b3261e", "second": "#9bb7e8", "queue": "#c4a000",
    "device": "#2f6fde", "host": "#0f9488", "decode": "#d9692a", "processor": "#8153c9", "other": "#8b95a1",
}  # fmt: skip
"""The light colours of the page's style sheet, by the names of its variables."""

_PAGE_ROW, _LETTERS = 0.28, 36
_MOST_LANES = 40
_COLUMNS = 1500
"""Parts of a timeline's width below which neighbours are drawn as one."""

_MOST_RECTANGLES = 4000
"""In a timeline; browsers are slow with many more."""

_PROLOGUE = re.compile(r"^.*?(?=<svg)| xmlns(:\w+)?=\"[^\"]*\"|<style.*?</style>| id=\"[\w.]+_\d+\"", re.DOTALL)
"""What an SVG file has and an element of a page must not: declarations, a style for all elements, repeated ids."""


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """Make an empty figure of a size in inches, to be drawn and saved within the context.

    Text is shown literally: `$` does not begin a formula, and letters that the font lacks give no warning.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "visionaccel", "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield Figure(figsize=(width, height), layout="constrained")


def plot_latency(report: EncodeReport, path: Path) -> None:
    """Write a PNG: seconds against patches, a line for each contender, with least and most as bars.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    with new_figure(9.0, 7.0) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        patches = {grid.grid: grid.patches for grid in report.grids}
        for number, each in enumerate(report.contenders):
            points = sorted(
                (patches[grid.grid], grid.median_seconds, grid.least_seconds, grid.most_seconds)
                for grid in each.grids
                if grid.median_seconds is not None and grid.least_seconds is not None and grid.most_seconds is not None
            )
            if not points:
                continue
            x, median, least, most = zip(*points, strict=True)
            below = [middle - end for middle, end in zip(median, least, strict=True)]
            above = [end - middle for middle, end in zip(median, most, strict=True)]
            about = f"{each.label} (SIMULATED)" if each.simulated else each.label
            upper.errorbar(
                x, median, [below, above], label=about, marker=_MARKS[number % len(_MARKS)], capsize=3, linewidth=1.2,
                color=f"C{number % 10}", linestyle="-" if each.kind == "backend" else "--",
            )  # fmt: skip
        upper.set(xscale="log", yscale="log", ylabel="seconds of an encode (median, least to most)")
        upper.set_xscale("log", base=2)
        upper.grid(visible=True, which="major", alpha=0.3)
        if upper.lines:
            upper.legend(fontsize="small", frameon=False)
        shares = sorted((grid.patches, 100 * grid.full_attention_share) for grid in report.grids)
        lower.plot(*zip(*shares, strict=True), color="grey", marker="o", linewidth=1.2)
        lower.set(xlabel="patches", ylabel="full attention,\n% of operations")
        lower.set_ylim(bottom=0)
        ticks = sorted({grid.patches for grid in report.grids})
        lower.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
        lower.minorticks_off()
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
        title = f"{report.source}, {report.plan.threads} threads, {report.machine.processor}"
        figure.suptitle(title, fontsize="medium")
        _save_png(figure, path)


def plot_timeline(runs: Mapping[str, Run], path: Path, title: str) -> None:
    """Write a PNG timeline: a lane for each server, with a row for each request of a run as its client saw it.

    A text stream is a row of marks, one for each token, with its stalls as spans. An image request is a bar from the
    time it was sent to its first token, and one from there to its last.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    from matplotlib.patches import Patch

    heights = [_FRAME + _ROW * len(run.traces) for run in runs.values()]
    with new_figure(_WIDTH, sum(heights) + 1.0) as figure:
        lanes = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=heights)
        for (name, run), (axes,) in zip(runs.items(), lanes, strict=True):
            _draw_lane(axes, name, run)
        lanes[-1][0].set_xlabel("seconds")
        lanes[-1][0].set_xlim(0, max(trace.arrivals[-1] for run in runs.values() for trace in run.traces) * 1.02)
        figure.suptitle(title, fontsize="medium")
        figure.legend(
            handles=[Patch(color=colour, label=label) for label, colour in _LEGEND.items()],
            loc="outside lower center",
            ncols=len(_LEGEND),
            fontsize="small",
            frameon=False,
        )
        _save_png(figure, path)


def draw_bars(chart: Bars) -> Picture:
    """Draw bars from top to bottom, with a line at the mark of each that has one."""
    ends = [max(bar.value, bar.mark or 0.0) for bar in chart.bars]
    with new_figure(_WIDTH, 0.6 + _PAGE_ROW * len(ends)) as figure:
        axes = figure.subplots()
        colours = [_COLOURS["second" if bar.second else "device"] for bar in chart.bars]
        axes.barh(range(len(ends)), [bar.value for bar in chart.bars], 0.65, color=colours, clip_on=False)
        title = chart.title
        for row, (bar, end) in enumerate(zip(chart.bars, ends, strict=True)):
            text = one_line(bar.text)
            axes.annotate(text, (end, row), (6, 0), textcoords="offset points", va="center", color=_COLOURS["ink"])
            if bar.mark is not None:
                axes.plot([bar.mark] * 2, [row - 0.45, row + 0.45], color=_COLOURS["failure"], clip_on=False)
                title = f"{chart.title}; red line: {chart.mark}"
        axes.set_title(one_line(title), loc="left", fontsize="medium", color=_COLOURS["ink"])
        _name_rows(axes, [bar.label for bar in chart.bars])
        axes.set_xlim(0, 1.25 * max(ends) or 1.0)
        axes.xaxis.set_visible(False)
        return _picture(figure, chart.title)


def draw_timeline(trace: Trace) -> Picture:
    """Draw a row for each thread, with a colour for each kind of work. The host's part is drawn over the device's."""
    from matplotlib.patches import Patch

    start = min(event.start for event in trace.events)
    took = max(max(event.end for event in trace.events) - start, 1.0)
    unit, scale = ("seconds", 1e6) if took >= 2e6 else ("milliseconds", 1e3)
    lanes = trace.lanes[:_MOST_LANES]
    with new_figure(_WIDTH, 1.1 + _PAGE_ROW * len(lanes)) as figure:
        axes = figure.subplots()
        kinds = [kind for kind in (*CATEGORIES, OTHER) if any(event.category == kind for event in trace.events)]
        near = took / _COLUMNS
        drawn = {
            (row, kind): spans((event for event in lane.events if event.category == kind), near)
            for row, lane in enumerate(lanes)
            for kind in sorted(kinds, key="host".__eq__)
        }
        while sum(map(len, drawn.values())) > _MOST_RECTANGLES:
            near *= 2
            drawn = {place: _joined(found, near) for place, found in drawn.items()}
        for (row, kind), found in drawn.items():
            scaled = [((left - start) / scale, width / scale) for left, width in found]
            axes.broken_barh(scaled, (row - 0.4, 0.8), facecolor=_COLOURS[kind], linewidth=0, clip_on=False)
        _name_rows(axes, [lane.name for lane in lanes])
        axes.set_xlim(0, took / scale)
        left_out = len(trace.lanes) - len(lanes)
        axes.set_xlabel(unit + (f"; {left_out} more threads are not shown" if left_out else ""), color=_COLOURS["ink"])
        figure.legend(
            handles=[Patch(color=_COLOURS[kind], label=kind) for kind in kinds],
            loc="outside upper left",
            ncols=len(kinds),
            frameon=False,
            labelcolor=_COLOURS["ink"],
        )
        return _picture(figure, "what each thread did when")


def spans(events: Iterable[Event], near: float) -> list[tuple[float, float]]:
    """Return start and width of what ordered events cover. Gaps below `near` are closed, and nothing is narrower."""
    return _joined(((event.start, max(event.duration, near)) for event in events), near)


def _joined(parts: Iterable[tuple[float, float]], near: float) -> list[tuple[float, float]]:
    """Join ordered parts, each given by start and width, across gaps below `near`."""
    found: list[list[float]] = []
    for start, width in parts:
        if found and start - found[-1][1] < near:
            found[-1][1] = max(found[-1][1], start + width)
        else:
            found.append([start, start + width])
    return [(start, end - start) for start, end in found]


def _draw_lane(axes: Axes, name: str, run: Run) -> None:
    rows = sorted(run.traces, key=lambda trace: (trace.kind == "image", trace.sent))
    for row, trace in enumerate(rows):
        if trace.kind == "text":
            axes.vlines(trace.arrivals, row - 0.35, row + 0.35, color=_TOKEN, linewidth=0.4)
            starts = zip(trace.arrivals, trace.gaps, strict=False)
            spans = [(start, gap) for start, gap in starts if gap > STALL]
            axes.broken_barh(spans, (row - 0.35, 0.7), color=_STALLED, alpha=0.6)
        else:
            first, last = trace.arrivals[0], trace.arrivals[-1]
            axes.barh(row, first - trace.sent, 0.7, left=trace.sent, color=_WAITING)
            axes.barh(row, last - first, 0.7, left=first, color=_ANSWERING)
            axes.vlines([first], row - 0.35, row + 0.35, color=_ANSWERING, linewidth=1.5)
    axes.set_yticks(range(len(rows)), [trace.name for trace in rows], fontsize="x-small")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(name, loc="left", fontsize="medium")
    for start, length in run.client_pauses:
        axes.axvspan(start, start + length, facecolor=_PAUSED, edgecolor="white", hatch="//", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _save_png(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigurationError(
            f"the plot cannot be written to {path}: {error}.", hint="Pass a file in a writable folder."
        ) from error


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Label the rows from top to bottom, and remove everything else around the picture."""
    axes.set_yticks(range(len(labels)), [one_line(label, _LETTERS) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(length=0, labelcolor=_COLOURS["ink"])
    axes.spines[:].set_visible(False)


def _picture(figure: Figure, title: str) -> Picture:
    """Make an `svg` element whose colours are the page's variables, so that it is light or dark like the page."""
    file = StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    names = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}
    svg = _PROLOGUE.sub("", file.getvalue())
    return Picture(re.sub(f"(?<=: )({'|'.join(names)})", lambda found: names[found[0]], svg), title)
