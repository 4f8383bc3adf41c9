"""Pictures by matplotlib without a display: plots of benchmarks as PNG files, and figures as SVG inside a page."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel.errors import ConfigurationError
from visionaccel_bench.encode.encode_report import ContenderReport, EncodeReport
from visionaccel_bench.serve.figures import STALL, Run

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
"""Inches of a timeline: its width, a row's height, and what a lane needs besides rows."""

_PROLOGUE = re.compile(r"^.*?(?=<svg)| xmlns(:\w+)?=\"[^\"]*\"|<style.*?</style>| id=\"[\w.]+_\d+\"", re.DOTALL)
"""What an SVG file holds and an element of a page does not: declarations, a style for all elements, repeated ids."""


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of a size in inches, to be drawn and saved within the context.

    Text is shown as it is: `$` does not begin a formula, and letters that the font lacks give no warning.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": "visionaccel", "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield Figure(figsize=(width, height), layout="constrained")


def inline_svg(figure: Figure) -> str:
    """The figure as an `svg` element for an HTML page, in which all text is escaped."""
    file = StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return _PROLOGUE.sub("", file.getvalue())


def plot_latency(report: EncodeReport, path: Path) -> None:
    """Write a PNG: a line for each contender with a median on some grid, its spread as bars, both axes logarithmic.

    Raises:
        ConfigurationError: If the file cannot be written.
    """
    with new_figure(9.0, 7.0) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        for number, each in enumerate(report.contenders):
            _draw_contender(upper, report, each, number)
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
    """Write a PNG timeline: a lane for each server, in it a row for each request of a run as its client saw it.

    A text stream is a row of marks, one for each token, with its stalls as spans; an image request is a bar from
    sent to its first token and on to its last.

    Raises:
        ConfigurationError: If the file cannot be written.
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


def _draw_contender(axes: Axes, report: EncodeReport, each: ContenderReport, number: int) -> None:
    patches = {grid.grid: grid.patches for grid in report.grids}
    points = sorted(
        (patches[grid.grid], grid.median_seconds, grid.least_seconds, grid.most_seconds)
        for grid in each.grids
        if grid.median_seconds is not None and grid.least_seconds is not None and grid.most_seconds is not None
    )
    if points:
        x, median, least, most = zip(*points, strict=True)
        below = [middle - end for middle, end in zip(median, least, strict=True)]
        above = [end - middle for middle, end in zip(median, most, strict=True)]
        about = f"{each.label} (SIMULATED)" if each.simulated else each.label
        axes.errorbar(
            x, median, [below, above], label=about, marker=_MARKS[number % len(_MARKS)], capsize=3, linewidth=1.2,
            color=f"C{number % 10}", linestyle="-" if each.kind == "backend" else "--",
        )  # fmt: skip


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
            f"the picture cannot be written to {path}: {error}.", hint="Name a file in a folder that you can write to."
        ) from error
