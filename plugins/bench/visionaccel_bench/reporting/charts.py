"""The page's pictures: bars next to one another, and what each thread did when."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from visionaccel.core.safe_text import one_line
from visionaccel_bench.drawing import inline_svg, new_figure
from visionaccel_bench.reporting.page import Picture
from visionaccel_bench.reporting.trace import CATEGORIES, OTHER, Event, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "ink": "#1d232b", "edge": "#d9dee4", "failure": "#b3261e", "second": "#9bb7e8", "queue": "#c4a000",
    "device": "#2f6fde", "host": "#0f9488", "decode": "#d9692a", "processor": "#8153c9", "other": "#8b95a1",
}  # fmt: skip
"""The light colours of the page's style sheet, by the names of its variables."""

_INCHES, _ROW, _LETTERS = 11.0, 0.28, 36
_MOST_LANES = 40
_COLUMNS = 1500
"""Parts of a timeline's width below which neighbours are drawn as one."""

_MOST_RECTANGLES = 4000
"""In a timeline; browsers are slow with many more."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar with a text at its end. `mark` is a length at which a line is drawn, such as a bound."""

    label: str
    value: float
    text: str
    mark: float | None = None
    second: bool = False

    @property
    def end(self) -> float:
        """Where the bar and its mark end."""
        return max(self.value, self.mark or 0.0)


def draw_bars(bars: Sequence[Bar], title: str, mark: str = "") -> Picture:
    """The bars, at least one, from top to bottom; `mark` says what their lines stand for."""
    with new_figure(_INCHES, 0.6 + _ROW * len(bars)) as figure:
        axes = figure.subplots()
        colours = [_COLOURS["second" if bar.second else "device"] for bar in bars]
        axes.barh(range(len(bars)), [bar.value for bar in bars], 0.65, color=colours, clip_on=False)
        marked = ""
        for row, bar in enumerate(bars):
            text, end = one_line(bar.text), (bar.end, row)
            axes.annotate(text, end, (6, 0), textcoords="offset points", va="center", color=_COLOURS["ink"])
            if bar.mark is not None:
                axes.plot([bar.mark] * 2, [row - 0.45, row + 0.45], color=_COLOURS["failure"], clip_on=False)
                marked = f"; red line: {mark}"
        axes.set_title(one_line(title + marked), loc="left", fontsize="medium", color=_COLOURS["ink"])
        _name_rows(axes, [bar.label for bar in bars])
        axes.set_xlim(0, 1.25 * max(bar.end for bar in bars) or 1.0)
        axes.xaxis.set_visible(False)
        return Picture(_follow_the_page(inline_svg(figure)), title)


def draw_timeline(trace: Trace) -> Picture:
    """One row for each thread, one colour for each kind of work. What a host does within an encode is drawn over it."""
    from matplotlib.patches import Patch

    start = min(event.start for event in trace.events)
    took = max(max(event.end for event in trace.events) - start, 1.0)
    unit, scale = ("seconds", 1e6) if took >= 2e6 else ("milliseconds", 1e3)
    lanes = trace.lanes[:_MOST_LANES]
    with new_figure(_INCHES, 1.1 + _ROW * len(lanes)) as figure:
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
            drawn = {place: joined(found, near) for place, found in drawn.items()}
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
        return Picture(_follow_the_page(inline_svg(figure)), "what each thread did when")


def spans(events: Iterable[Event], near: float) -> list[tuple[float, float]]:
    """Start and width of what ordered events cover. Gaps below `near` are not shown, and nothing is narrower."""
    return joined(((event.start, max(event.duration, near)) for event in events), near)


def joined(parts: Iterable[tuple[float, float]], near: float) -> list[tuple[float, float]]:
    """Start and width of what parts cover, given by theirs and ordered; those with gaps below `near` as one."""
    found: list[list[float]] = []
    for start, width in parts:
        if found and start - found[-1][1] < near:
            found[-1][1] = max(found[-1][1], start + width)
        else:
            found.append([start, start + width])
    return [(start, end - start) for start, end in found]


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Rows from top to bottom with their labels, and nothing else around the picture."""
    axes.set_yticks(range(len(labels)), [_short(label) for label in labels], color=_COLOURS["ink"])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(length=0, labelcolor=_COLOURS["ink"])
    axes.spines[:].set_visible(False)


def _follow_the_page(svg: str) -> str:
    """With the page's variables in the place of colours, so that the picture is light or dark as the page is."""
    names = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}
    return re.sub(f"(?<=: )({'|'.join(names)})", lambda found: names[found[0]], svg)


def _short(label: str) -> str:
    return one_line(label, _LETTERS)
