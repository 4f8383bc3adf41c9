"""Tables of text, which the terminal and the report's page show alike, and how numbers are written in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from visionaccel.cli.output import results

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
    """Print a table among the command's results."""
    shown = RichTable(title=table.title or None, box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for number, name in enumerate(table.columns):
        justify: Literal["left", "right"] = "right" if number and table.layout == "numbers" else "left"
        shown.add_column(name, justify=justify, overflow="fold")
    for row in table.rows:
        shown.add_row(*row, style=_STYLES.get(row[0]) if table.layout == "statuses" else None)
    results.print(shown)


def seconds(value: float | None) -> str:
    """Seconds with three decimals, or two from ten on."""
    return DASH if value is None else f"{value:.3f}" if value < 10 else f"{value:.2f}"
