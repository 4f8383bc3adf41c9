"""HTML from values: the one place where text becomes HTML, so that no text can be anything but text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TypeAlias

from visionaccel.backends.spec import Status
from visionaccel.core.safe_text import one_line

__all__ = ["Content", "Html", "chip", "element", "html", "joined", "paragraph", "table"]

_VOID = frozenset({"br", "meta", "rect", "line"})


class Html(str):
    """Text that is HTML already, from the functions of this module."""

    __slots__ = ()


Content: TypeAlias = str | float | None
"""What can be shown: text, which is escaped unless it is `Html`, a number, or nothing."""


def html(value: Content) -> Html:
    """A value as HTML. Text is escaped, quotes too; what cannot be printed is replaced, and long text is cut off."""
    if isinstance(value, Html):
        return value
    return Html("" if value is None else escape(one_line(str(value)), quote=True))


def joined(parts: Iterable[Content]) -> Html:
    """Values one after the other."""
    return Html("".join(map(html, parts)))


def element(name: str, /, *content: Content, **attributes: Content) -> Html:
    """An element of HTML or SVG.

    Args:
        name: Its name.
        content: What is in it.
        attributes: Its attributes. `_` in a name stands for `-`, at its end for nothing (`class_`); None for no
            attribute.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID and not content:
        return Html(f"<{name}{given}>") if name in ("br", "meta") else Html(f"<{name}{given}/>")
    return Html(f"<{name}{given}>{joined(content)}</{name}>")


def _short(value: Content) -> Content:
    """A number without places that no screen shows."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def paragraph(*content: Content, class_: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *content, class_=class_)


def chip(status: Status) -> Html:
    """A status as a coloured word."""
    return element("span", status, class_=f"chip {status}")


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Content]], *, numbers: bool = False, class_: str | None = None
) -> Html:
    """A table.

    Args:
        columns: The heads.
        rows: The cells of each row.
        numbers: Whether all columns but the first hold numbers, which are set to the right.
        class_: Its class, if it is not one of numbers.
    """
    head = element("tr", *(element("th", name, scope="col") for name in columns))
    body = [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    made = element("table", element("thead", head), element("tbody", *body), class_="numbers" if numbers else class_)
    return element("div", made, class_="wide")
