"""What benchmarks and reports show, as data: text, tables and bars, for the terminal and for the report's page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from visionaccel.cli import output

Seconds = Annotated[float, Field(ge=0, le=1e12)]
"""Seconds that a picture can show, checked when a report is read from a file. The maximum is 30,000 years."""

DASH = "-"
"""Stands for a missing value."""

_STYLES = {"failure": "bold red", "warning": "yellow"}


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, a remark in a paler colour, or a heading within a section."""

    kind: ClassVar = "text"

    text: str
    layout: Literal["paragraph", "remark", "heading"] = "paragraph"


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its column heads, and the cells of each row.

    Attributes:
        layout: `numbers` aligns all columns but the first to the right; in `statuses`, the first column holds `pass`,
            `warning` or `failure`.
        folded: Whether the page hides it until its title is clicked.
    """

    kind: ClassVar = "table"

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    layout: Literal["text", "numbers", "statuses"] = "text"
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar with a text at its end. `mark` is a length at which a line is drawn; `second` selects a paler colour."""

    label: str
    value: float
    text: str
    mark: float | None = None
    second: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars from top to bottom, at least one, for the page only. `mark` says what the lines mean."""

    bars: Sequence[Bar]
    title: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """An `svg` element in which all text is escaped. `title` describes it for readers who cannot see it."""

    kind: ClassVar = "picture"

    svg: str
    title: str


Block: TypeAlias = Text | Table | Bars


def print_blocks(blocks: Iterable[Block]) -> None:
    """Print texts, and tables with an empty line after each, to the command's results."""
    for block in blocks:
        if isinstance(block, Text):
            output.results.print(block.text)
        elif isinstance(block, Table):
            numbers, statuses = block.layout == "numbers", block.layout == "statuses"
            styles = [_STYLES.get(row[0], "") for row in block.rows] if statuses else None
            output.print_table(block.title, block.columns, block.rows, styles=styles, numbers=numbers)
            output.results.print()


def seconds(value: float | None) -> str:
    """Format seconds with three decimals, or two from ten on."""
    return DASH if value is None else f"{value:.3f}" if value < 10 else f"{value:.2f}"
