"""Bars beside one another, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from visionaccel_bench.reporting.markup import Html, element

__all__ = ["Bar", "draw_bars"]

_WIDTH, _LEFT, _RIGHT = 1120.0, 250.0, 130.0
_ROW, _HEIGHT = 26.0, 16.0
_PLOT = _WIDTH - _LEFT - _RIGHT
_LEGEND = _LEFT + _PLOT / 2
_LETTERS = 36


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar.

    Attributes:
        label: What it is of.
        value: Its length; None for none.
        text: What stands behind it.
        mark: A length at which a line is drawn, such as a bound; None for none.
        second: Whether it has the second colour.
    """

    label: str
    value: float | None
    text: str
    mark: float | None = None
    second: bool = False


def draw_bars(bars: Sequence[Bar], title: str, mark: str = "") -> Html:
    """The bars as SVG.

    Args:
        bars: From top to bottom.
        title: What they show, with its unit.
        mark: What the lines stand for, where there are any.
    """
    most = max((value for bar in bars for value in (bar.value, bar.mark) if value is not None), default=0.0) or 1.0
    marked = any(bar.mark is not None for bar in bars)
    parts = [element("text", title, x=0, y=14, class_="faint")]
    if marked:
        parts += [
            element("line", x1=_LEGEND, x2=_LEGEND, y1=4, y2=16, class_="mark"),
            element("text", mark, x=_LEGEND + 8, y=14, class_="faint"),
        ]
    for index, bar in enumerate(bars):
        parts += _bar(bar, 24 + index * _ROW, _PLOT / most)
    height = 28 + _ROW * len(bars)
    return element("svg", *parts, viewBox=f"0 0 {_WIDTH:g} {height:g}", role="img", aria_label=title, class_="bars")


def _bar(bar: Bar, top: float, scale: float) -> Iterator[Html]:
    label = bar.label if len(bar.label) <= _LETTERS else f"{bar.label[: _LETTERS - 1]}…"
    yield element("text", label, element("title", bar.label), x=0, y=top + 13)
    width = max((bar.value or 0.0) * scale, 0.0)
    if bar.value is not None:
        colour = "second" if bar.second else "bar"
        yield element("rect", x=_LEFT, y=top, width=max(width, 1.0), height=_HEIGHT, rx=2, class_=colour)
    x = _LEFT + width
    if bar.mark is not None:
        place = _LEFT + max(bar.mark, 0.0) * scale
        yield element("line", x1=place, x2=place, y1=top - 3, y2=top + _HEIGHT + 3, class_="mark")
        x = max(x, place)
    yield element("text", bar.text, x=x + 8, y=top + 13)
