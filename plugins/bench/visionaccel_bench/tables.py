"""Tables of text, which the terminal and the report's page show alike, and how numbers are written in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from visionaccel.cli import output

Seconds = Annotated[float, Field(ge=0, le=1e12)]
"""A figure that a picture can show, checked where a report is read from a file. The most is 30,000 years."""

DASH = "-"
"""Stands for a value that is not there."""

_STYLES = {"failure": "bold red", "warning": "yellow"}


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its heads, and the cells of each row, one for each column.

    Attributes:
        layout: `numbers` aligns all columns but the first to the right; in `statuses`, the first column holds `pass`,
            `warning` or `failure`.
        folded: Whether the page shows it only when its title is opened.
    """

    kind: ClassVar = "table"

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    layout: Literal["text", "numbers", "statuses"] = "text"
    folded: bool = False


def print_table(table: Table) -> None:
    """Print a table among the command's results, and an empty line."""
    styles = [_STYLES.get(row[0], "") for row in table.rows] if table.layout == "statuses" else None
    output.print_table(table.title, table.columns, table.rows, styles=styles, numbers=table.layout == "numbers")
    output.results.print()


def seconds(value: float | None) -> str:
    """Seconds with three decimals, or two from ten on."""
    return DASH if value is None else f"{value:.3f}" if value < 10 else f"{value:.2f}"
