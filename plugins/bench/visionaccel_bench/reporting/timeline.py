"""A trace as a picture: one lane for each thread, one colour for each kind of work, and a few thousand rectangles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from visionaccel_bench.reporting.markup import Html, element
from visionaccel_bench.reporting.trace import CATEGORIES, OTHER, Event, Lane, Trace

__all__ = ["MOST_RECTANGLES", "draw_timeline", "rectangles"]

MOST_RECTANGLES = 4000
MOST_LANES = 40

_WIDTH, _LEFT, _RIGHT = 1120.0, 250.0, 12.0
_ROW, _GAP, _TOP, _AXIS = 16.0, 8.0, 34.0, 26.0
_PLOT = _WIDTH - _LEFT - _RIGHT
_MOST_ROWS = 6
_NARROW = 1 / 3
"""Pixels: what is narrower is merged with what is beside it."""

_ROUNDED = 0.2
"""Microseconds by which one event may seem to begin before the one ahead of it ends: times are written rounded."""

_NAME_LETTERS = 36
_TICKS = 8


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Of one colour, in a row of a lane.

    Attributes:
        row: Counted from the top of its lane.
        left: In pixels from where the time begins.
        width: In pixels.
        category: Its colour.
        told: What it stands for.
    """

    row: int
    left: float
    width: float
    category: str
    told: str


def draw_timeline(trace: Trace) -> Html:
    """The picture as SVG, with legend and axis."""
    start, seconds = _extent(trace)
    scale = _PLOT / (seconds * 1e6)
    shown = trace.lanes[:MOST_LANES]
    narrow = _NARROW
    drawn = [rectangles(lane, start, scale, narrow) for lane in shown]
    while sum(map(len, drawn)) > MOST_RECTANGLES:
        narrow *= 2
        drawn = [rectangles(lane, start, scale, narrow) for lane in shown]
    parts: list[Html] = [*_legend(trace)]
    top = _TOP
    for lane, found in zip(shown, drawn, strict=True):
        height = _ROW * (1 + max((each.row for each in found), default=0))
        parts += _lane(lane, found, top, height)
        top += height + _GAP
    parts += _axis(seconds, top)
    left_out = len(trace.lanes) - len(shown)
    if left_out:
        parts.append(element("text", f"{left_out} more lanes are not shown", x=0, y=top + 14, class_="faint"))
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH:g} {top + _AXIS:g}",
        role="img",
        aria_label="What was done when",
        class_="timeline",
    )


def rectangles(lane: Lane, start: float, scale: float, narrow: float) -> list[Rectangle]:
    """The rectangles of a lane.

    Events at the same time are in rows below one another. Those narrower than `narrow` fill bins of that width, each of
    the colour that most of its time is; bins of one colour side by side are one rectangle.

    Args:
        lane: The lane.
        start: When the picture begins, in microseconds.
        scale: Pixels of a microsecond.
        narrow: Pixels.
    """
    found: list[Rectangle] = []
    bins: dict[tuple[int, int], dict[str, float]] = {}
    for row, event in _rows(lane.events):
        left, width = (event.start - start) * scale, event.duration * scale
        if width < narrow:
            times = bins.setdefault((row, int(left / narrow)), {})
            times[event.category] = times.get(event.category, 0.0) + width
        else:
            found.append(Rectangle(row, left, width, event.category, _told(event, start)))
    return found + list(_of_bins(bins, narrow))


def _rows(events: Sequence[Event]) -> Iterator[tuple[int, Event]]:
    """Each event in the first row that is free when it begins; the last row takes what finds none."""
    ends: list[float] = []
    for event in events:
        row = next((i for i, end in enumerate(ends) if end <= event.start + _ROUNDED), len(ends))
        if row == len(ends) and row < _MOST_ROWS:
            ends.append(event.end)
        row = min(row, _MOST_ROWS - 1)
        ends[row] = max(ends[row], event.end)
        yield row, event


def _of_bins(bins: dict[tuple[int, int], dict[str, float]], narrow: float) -> Iterator[Rectangle]:
    run: tuple[int, int, int, str] | None = None  # row, first bin, last bin, colour
    for (row, place), times in sorted(bins.items()):
        category = max(times, key=lambda name: times[name])
        if run is not None and run[0] == row and run[2] == place - 1 and run[3] == category:
            run = (row, run[1], place, category)
            continue
        if run is not None:
            yield _of_run(run, narrow)
        run = (row, place, place, category)
    if run is not None:
        yield _of_run(run, narrow)


def _of_run(run: tuple[int, int, int, str], narrow: float) -> Rectangle:
    row, first, last, category = run
    return Rectangle(row, first * narrow, (last - first + 1) * narrow, category, f"short {category} events")


def _told(event: Event, start: float) -> str:
    began, took = (event.start - start) / 1e3, event.duration / 1e3
    about = f" ({event.about})" if event.about else ""
    return f"{event.name}: {event.category}, {took:.3f} ms from {began:.3f} ms{about}"


def _extent(trace: Trace) -> tuple[float, float]:
    """When it begins, in microseconds, and how many seconds it takes."""
    events = trace.events
    start, end = min(event.start for event in events), max(event.end for event in events)
    return start, max((end - start) / 1e6, 1e-6)


def _lane(lane: Lane, found: Sequence[Rectangle], top: float, height: float) -> Iterator[Html]:
    name = lane.name if len(lane.name) <= _NAME_LETTERS else f"{lane.name[: _NAME_LETTERS - 1]}…"
    yield element("rect", x=_LEFT, y=top, width=_PLOT, height=height, class_="lane")
    yield element("text", name, element("title", lane.name), x=0, y=top + 12.5)
    for each in found:
        at = {
            "x": _LEFT + each.left,
            "y": top + each.row * _ROW + 1,
            "width": max(each.width, _NARROW),
            "height": _ROW - 2,
        }
        yield element("rect", element("title", each.told), **at, class_=each.category)


def _legend(trace: Trace) -> Iterator[Html]:
    there = {event.category for event in trace.events}
    x = _LEFT
    for category in (*CATEGORIES, OTHER):
        if category in there:
            yield element("rect", x=x, y=4, width=12, height=12, rx=2, class_=category)
            yield element("text", category, x=x + 18, y=14.5)
            x += 40 + 7.5 * len(category)


def _axis(seconds: float, top: float) -> Iterator[Html]:
    step = _step(seconds)
    unit, factor = ("s", 1.0) if seconds >= 2 else ("ms", 1e3)
    for index in range(int(seconds / step + 1e-9) + 1):
        x = _LEFT + index * step / seconds * _PLOT
        yield element("line", x1=x, x2=x, y1=_TOP - 6, y2=top, class_="axis")
        anchor = "end" if x > _WIDTH - 40 else "middle"
        yield element(
            "text", f"{index * step * factor:.6g} {unit}", x=x, y=top + 14, text_anchor=anchor, class_="faint"
        )


def _step(seconds: float) -> float:
    """A round number of seconds of which there are at most `_TICKS`."""
    power = 10.0 ** math.floor(math.log10(seconds / _TICKS))
    return next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power * _TICKS >= seconds)
