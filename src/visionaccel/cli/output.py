"""Where the command prints: results on stdout, everything else on stderr; and the arguments that commands share."""

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
    """Shows text from files and plug-ins as text: it is not markup, and has no control characters."""

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
OptionsText = Annotated[
    str | None, typer.Option("--options", help="Backend options: name=value,name=value or a JSON object.")
]


_GAP = 2
_LONG_WORD = 24
_NUMBER = re.compile(r"[\d.e+-]+")


@contextmanager
def own_stdout() -> Iterator[None]:
    """Keep stdout for what Python prints there in the context. What else writes to its descriptor writes to stderr.

    It still does so afterwards: some vendors' libraries print when the process ends.
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
    """Keep stdout for results: what else Python prints there, such as in a plug-in, goes to stderr. Decorates, too."""
    if sys.stderr is None or results.file is not sys.stdout:  # or it is kept already
        yield
        return
    results.file = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        results.file = None  # type: ignore[assignment] # rich's word for the stdout of the moment


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done; the function changes it."""
    with messages.status(Text(visible(text))) as shown:
        yield lambda text: shown.update(Text(visible(text)))


@contextmanager
def progress(amount: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr, one for each stage. The function takes a stage, how much of it is done and how much there is."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(visible(stage), total=total)
            bars.update(tasks[stage], completed=done)

        yield tell


def backend_options(text: str | None, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """Backend options from `--options`, or the settings' where it is not given."""
    if text is None:
        return default
    try:
        options: Mapping[str, Any] = parse_options(text)
    except ValueError as error:
        raise SettingsError(f"--options {text!r}: {error}.", hint="Write name=value,name=value.") from error
    return options


def finite(value: float | None) -> float | None:
    """Refuses NaN and infinity, which a command-line option's range lets pass."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def check_writable(*files: Path | None) -> None:
    """Refuses files that cannot be written, before the work is done whose result goes there."""
    for file in files:
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ConfigurationError(
                f"{file} is not a file in an existing folder.", hint="Name a file in a folder that exists."
            )


def write_json(value: Any, file: Path | None) -> None:
    """Write the document that `print_json` prints into a file, if one is given."""
    if file is None:
        return
    try:
        file.write_text(json.dumps(value, indent=1, default=str) + "\n")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error}", hint="Name another file.") from error


def _table(title: str, **given: Any) -> Table:
    """A table that takes little room, so that its cells fit into a terminal of 80 columns."""
    return Table(title=title or None, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), **given)


def _widths(cells: Sequence[Sequence[str]], room: int) -> Sequence[int | None]:
    """A width for each column, given its cells, in which no word breaks; None for each if there is no room for that."""
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
    """A table of texts and numbers on stdout.

    Args:
        title: What stands above it, if anything.
        columns: The heads.
        rows: The cells of each row.
        styles: The style of each row.
        numbers: Align all columns but the first to the right, also those that hold more than numbers.
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
    """A table of names with what they stand for, without those that stand for nothing, and an empty line."""
    table = _table(title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, detail in details.items():
        if detail:
            table.add_row(name, str(detail))
    results.print(table)
    results.print()


def number(value: float | None) -> str:
    """Two places after the point; a dash for nothing."""
    return "-" if value is None else f"{value:.2f}"


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=1, default=str), file=results.file, flush=True)
