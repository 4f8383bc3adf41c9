"""Tables of text, which the terminal and the report's page show alike, and how numbers are written in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from visionaccel.cli import output

DASH = "-"
"""Stands for a value that is not there."""

_STYLES = {"failure": "bold red", "warning": "yellow"}


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        columns: The heads.
        rows: The cells of each row, one for each column.
        title: What stands above it.
        layout: `numbers` aligns all columns but the first to the right; in `statuses`, the first column holds `pass`,
            `warning` or `failure`.
    """

    kind: ClassVar = "table"

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    layout: Literal["text", "numbers", "statuses"] = "text"


def print_table(table: Table) -> None:
    """Print a table among the command's results, and an empty line."""
    styles = [_STYLES.get(row[0], "") for row in table.rows] if table.layout == "statuses" else None
    output.print_table(table.title, table.columns, table.rows, styles=styles, numbers=table.layout == "numbers")
    output.results.print()


def seconds(value: float | None) -> str:
    """Seconds with three decimals, or two from ten on."""
    return DASH if value is None else f"{value:.3f}" if value < 10 else f"{value:.2f}"
