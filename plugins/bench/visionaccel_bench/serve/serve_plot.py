"""A picture of what clients saw: one lane for each server, one row for each request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel_bench.drawing import new_figure, save_png
from visionaccel_bench.serve.figures import STALL, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TOKEN, _STALLED, _WAITING, _ANSWERING, _PAUSED = "#4c72b0", "#c44e52", "#d0d0d0", "#55a868", "#f6efd5"
_LEGEND = {
    "text token": _TOKEN,
    f"text stalls over {1e3 * STALL:.0f} ms": _STALLED,
    "image waits for its first token": _WAITING,
    "image answered": _ANSWERING,
    "client itself paused": _PAUSED,
}
_WIDTH, _ROW, _FRAME = 11.0, 0.22, 0.7
"""Inches: the picture's width, a row's height, and what a lane needs besides rows."""


def plot_timeline(runs: Mapping[str, Run], path: Path, title: str) -> None:
    """Write a PNG timeline.

    A text stream is a row of marks, one for each token, with its stalls as spans; an image request is a bar from
    sent to its first token and on to its last.

    Args:
        runs: One run of each server.
        path: The file.
        title: What is shown above; it should say whether the device is simulated.

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
        save_png(figure, path)


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
