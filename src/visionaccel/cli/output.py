"""How commands print: results on stdout, everything else on stderr. Also the options that commands share."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from visionaccel.core.safe_text import visible
from visionaccel.errors import ConfigurationError, SettingsError
from visionaccel.settings import parse_options


class _SafeConsole(Console):
    """Shows text from files and plug-ins literally: not as markup, and without control characters."""

    def render_str(self, text: str, **given: Any) -> Text:
        return super().render_str(visible(text), **given)


results = _SafeConsole(soft_wrap=False, markup=False, emoji=False)
"""Tables and answers."""

messages = _SafeConsole(stderr=True, markup=False, emoji=False)
"""Progress, warnings and errors."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the Hugging Face repository.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
Backend = Annotated[
    str | None, typer.Option(help="A backend's name or 'auto'. Default: VISIONACCEL_BACKEND, or 'auto'.")
]
Device = Annotated[
    str | None, typer.Option(help="The backend's device. Default: VISIONACCEL_DEVICE, or the backend's own.")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Maximum length of an answer, in tokens. Default: 128.")]
EncodingBundle = Annotated[
    Path | None,
    typer.Option("--bundle", help="Bundle whose programs encode; images are fitted to them by VISIONACCEL_FIT."),
]
OptionsText = Annotated[
    str | None, typer.Option("--options", help="Backend options: name=value,name=value or a JSON object.")
]


_GAP = 2
_LONG_WORD = 24
_NUMBER = re.compile(r"[\d.e+-]+")


@contextmanager
def own_stdout() -> Iterator[None]:
    """Keep stdout for what Python prints there in the context. What libraries write to its descriptor goes to stderr.

    This does not end with the context: some vendor libraries print when the process ends.
    """
    if sys.stdout is None or sys.stderr is None:  # closed by what started this process
        yield
        return
    sys.stdout.flush()
    descriptor = sys.stdout.fileno()
    kept = os.fdopen(os.dup(descriptor), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(sys.stderr.fileno(), descriptor)
    with redirect_stdout(kept):
        yield


@contextmanager
def results_only() -> Iterator[None]:
    """Keep stdout for results: other output of Python code, such as a plug-in's, goes to stderr. Also a decorator."""
    if sys.stderr is None or results.file is not sys.stdout:  # stderr is closed, or an outer context keeps stdout
        yield
        return
    results.file = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        results.file = None  # type: ignore[assignment] # rich then writes to the current stdout


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done; the function changes the text."""
    with messages.status(Text(visible(text))) as shown:
        yield lambda text: shown.update(Text(visible(text)))


@contextmanager
def progress(amount: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr for each stage. The function takes a stage, how much of it is done, and its total."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(visible(stage), total=total)
            bars.update(tasks[stage], completed=done)

        yield tell


def backend_options(text: str | None, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parse the backend options of `--options`; without it, return the default."""
    if text is None:
        return default
    try:
        options: Mapping[str, Any] = parse_options(text)
    except ValueError as error:
        raise SettingsError(f"--options {text!r}: {error}.", hint="Write name=value,name=value.") from error
    return options


def finite(value: float | None) -> float | None:
    """Refuse NaN and infinity, which the range of an option allows."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def check_writable(*files: Path | None) -> None:
    """Refuse files that cannot be written, before the work whose result goes there."""
    for file in files:
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ConfigurationError(
                f"{file} is not a file in an existing folder.", hint="Pass a file in a folder that exists."
            )


def _table(title: str, **given: Any) -> Table:
    """Make a compact table, which fits into a terminal of 80 columns."""
    return Table(title=title or None, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), **given)


def _widths(cells: Sequence[Sequence[str]], room: int) -> Sequence[int | None]:
    """Choose column widths at which no word breaks, from each column's cells; None for each if they do not fit."""
    wanted = [max(len(line) for cell in column for line in (*cell.splitlines(), "")) for column in cells]
    words = [max(len(word) for cell in column for word in (*cell.split(), "")) for column in cells]
    widths = [min(_LONG_WORD, longest) for longest in words]
    spare = room - sum(widths)
    while spare > 0 and (narrow := [number for number, width in enumerate(widths) if width < wanted[number]]):
        widths[min(narrow, key=lambda number: widths[number])] += 1
        spare -= 1
    return widths if spare >= 0 else [None] * len(widths)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    styles: Sequence[str] | None = None,
    numbers: bool = False,
) -> None:
    """Print a table of texts and numbers on stdout.

    Args:
        title: The line above it, if any.
        columns: The head of each column.
        rows: The cells of each row.
        styles: The style of each row.
        numbers: Right-align all columns but the first; otherwise only columns of numbers.
    """
    table = _table(title)
    cells = [[name, *(str(row[number]) for row in rows)] for number, name in enumerate(columns)]
    widths = _widths(cells, results.width - _GAP * (len(columns) - 1))
    for number, (name, *below) in enumerate(cells):
        right = (numbers and number > 0) or all(map(_NUMBER.fullmatch, below))
        table.add_column(name, justify="right" if right else "left", overflow="fold", width=widths[number])
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        table.add_row(*map(str, row), style=style)
    results.print(table)


def print_details(title: str, details: Mapping[str, object]) -> None:
    """Print a table of names and details, without empty details, and an empty line."""
    table = _table(title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, detail in details.items():
        if detail:
            table.add_row(name, str(detail))
    results.print(table)
    results.print()


def print_json(value: Any) -> None:
    """Print a JSON document on stdout."""
    print(json.dumps(value, indent=1, default=str), file=results.file, flush=True)
