"""The page's pictures: bars next to one another, and what each thread did when."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from visionaccel.core.safe_text import one_line
from visionaccel_bench.drawing import inline_svg, new_figure
from visionaccel_bench.reporting.page import Picture
from visionaccel_bench.reporting.trace import CATEGORIES, OTHER, Event, Trace

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
    """One bar.

    Attributes:
        label: What it is of.
        value: Its length.
        text: What stands at its end.
        mark: A length at which a line is drawn, such as a bound; None for none.
        second: Whether it has the second colour.
    """

    label: str
    value: float
    text: str
    mark: float | None = None
    second: bool = False


def draw_bars(bars: Sequence[Bar], title: str, mark: str = "") -> Picture:
    """The bars below one another.

    Args:
        bars: From top to bottom, at least one.
        title: What they show, with its unit.
        mark: What the lines stand for, where there are any.
    """
    with new_figure(_INCHES, 0.6 + _ROW * len(bars)) as figure:
        axes = figure.subplots()
        rows = range(len(bars))
        axes.barh(
            rows,
            [bar.value for bar in bars],
            0.65,
            color=[_COLOURS["second" if bar.second else "device"] for bar in bars],
            clip_on=False,
        )
        for row, bar in enumerate(bars):
            end = max(bar.value, bar.mark or 0.0)
            axes.annotate(
                one_line(bar.text), (end, row), (6, 0), textcoords="offset points", va="center", color=_COLOURS["ink"]
            )
        marked = [(row, bar.mark) for row, bar in enumerate(bars) if bar.mark is not None]
        for row, place in marked:
            axes.plot([place, place], [row - 0.45, row + 0.45], color=_COLOURS["failure"], clip_on=False)
        heading = one_line(f"{title}; red line: {mark}" if marked else title)
        axes.set_title(heading, loc="left", fontsize="medium", color=_COLOURS["ink"])
        axes.set_yticks(rows, [_short(bar.label) for bar in bars], color=_COLOURS["ink"])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, 1.25 * max((max(bar.value, bar.mark or 0.0) for bar in bars), default=0.0) or 1.0)
        axes.xaxis.set_visible(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
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
        axes.set_yticks(range(len(lanes)), [_short(lane.name) for lane in lanes], color=_COLOURS["ink"])
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(0, took / scale)
        left_out = len(trace.lanes) - len(lanes)
        axes.set_xlabel(unit + (f"; {left_out} more threads are not shown" if left_out else ""), color=_COLOURS["ink"])
        axes.tick_params(length=0, labelcolor=_COLOURS["ink"])
        axes.spines[:].set_visible(False)
        figure.legend(
            handles=[Patch(color=_COLOURS[kind], label=kind) for kind in kinds],
            loc="outside upper left",
            ncols=len(kinds),
            frameon=False,
            labelcolor=_COLOURS["ink"],
        )
        return Picture(_follow_the_page(inline_svg(figure)), "what each thread did when")


def spans(events: Iterable[Event], near: float) -> list[tuple[float, float]]:
    """Start and width of what events cover, in microseconds.

    Args:
        events: Ordered by their start.
        near: Gaps below this are not shown, and nothing is narrower.
    """
    return joined(((event.start, max(event.duration, near)) for event in events), near)


def joined(parts: Iterable[tuple[float, float]], near: float) -> list[tuple[float, float]]:
    """Start and width of what parts cover, those with gaps below `near` as one.

    Args:
        parts: Start and width of each, ordered by their start.
        near: In the same unit.
    """
    found: list[list[float]] = []
    for start, width in parts:
        if found and start - found[-1][1] < near:
            found[-1][1] = max(found[-1][1], start + width)
        else:
            found.append([start, start + width])
    return [(start, end - start) for start, end in found]


def _follow_the_page(svg: str) -> str:
    """With the page's variables in the place of colours, so that the picture is light or dark as the page is."""
    names = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}
    return re.sub(f"(?<=: )({'|'.join(names)})", lambda found: names[found[0]], svg)


def _short(label: str) -> str:
    line = one_line(label)
    return line if len(line) <= _LETTERS else f"{line[: _LETTERS - 1]}…"
