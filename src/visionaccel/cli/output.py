"""Where the command prints: results on stdout, everything else on stderr; and the arguments that commands share."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
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


_P = ParamSpec("_P")
_T = TypeVar("_T")
_STDOUT = 1


class _Process:
    """Whether stdout is this command's to keep: in a process that it does not own, others print there afterwards."""

    owned = False
    printing = False


def own_stdout() -> None:
    """From the next `prints_results` on, keep the file descriptor of stdout for results until the process ends."""
    _Process.owned = True


@contextmanager
def results_only(*, for_good: bool = False) -> Iterator[None]:
    """Keep stdout for results: what else prints there, such as a plug-in, prints to stderr.

    Args:
        for_good: Leave it so afterwards if this process is the command's own: what vendors' libraries print is written
            by C, some of it when the process ends.
    """
    stdout, owned = sys.stdout, _Process.owned
    if _Process.printing or stdout is None or sys.stderr is None:  # closed by what started this process
        yield
        return
    kept = stdout
    if owned:
        stdout.flush()
        kept = os.fdopen(os.dup(_STDOUT), "w", encoding=stdout.encoding, errors=stdout.errors)
        os.dup2(sys.stderr.fileno(), _STDOUT)
    results.file, sys.stdout, _Process.printing = kept, sys.stderr, True
    try:
        yield
    finally:
        if owned:
            kept.flush()
        if not (owned and for_good):
            results.file = None  # type: ignore[assignment] # rich's word for the stdout of the moment
            sys.stdout, _Process.printing = stdout, False
            if owned:
                os.dup2(kept.fileno(), _STDOUT)
                kept.close()


def prints_results(command: Callable[_P, _T], *, for_good: bool = True) -> Callable[_P, _T]:
    """A command that runs under `results_only`."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with results_only(for_good=for_good):
            return command(*args, **kwargs)

    return run


def print_results_of(command: Any) -> None:
    """Have `prints_results` wrap a built command, and those of a group at every depth."""
    commands = getattr(command, "commands", {})
    if command.callback is not None:
        # After a group's own function, a command's help may follow on stdout.
        command.callback = prints_results(command.callback, for_good=not commands)
    for nested in commands.values():
        print_results_of(nested)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done; the function changes it."""
    with messages.status(Text(visible(text))) as shown:
        yield lambda text: shown.update(Text(visible(text)))


@contextmanager
def progress(amount: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr, one for each stage. The function takes a stage, how much of it is done and how much there is.

    Args:
        amount: The column that says how much is done.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(visible(stage), total=total)
            bars.update(tasks[stage], completed=done)

        yield tell


def backend_options(text: str | None, default: Mapping[str, Any]) -> Mapping[str, Any]:
    """Backend options from `--options`, or the settings' where it is not given.

    Raises:
        SettingsError: If the text is malformed.
    """
    if text is None:
        return default
    try:
        options: Mapping[str, Any] = parse_options(text)
    except ValueError as error:
        raise SettingsError(f"--options {text!r}: {error}.", hint="Write name=value,name=value.") from error
    return options


def finite(value: float | None) -> float | None:
    """Refuses NaN and infinity, which a command-line option's range lets pass.

    Raises:
        BadParameter: If it is one of these.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def check_writable(*files: Path | None) -> None:
    """That files can be written, before the work is done whose result goes there.

    Raises:
        ConfigurationError: If one is in no folder, or is one.
    """
    for file in files:
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise ConfigurationError(
                f"{file} is not a file in an existing folder.", hint="Name a file in a folder that exists."
            )


def write_json(value: Any, file: Path | None) -> None:
    """The document that `print_json` prints, into a file if there is one.

    Raises:
        ConfigurationError: If it cannot be written.
    """
    if file is None:
        return
    try:
        file.write_text(json.dumps(value, indent=1, default=str) + "\n")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error}", hint="Name another file.") from error


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table of texts and numbers on stdout."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(str, row))
    results.print(table)


def number(value: float | None) -> str:
    """Two places after the point; a dash for nothing."""
    return "-" if value is None else f"{value:.2f}"


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=1, default=str), file=results.file, flush=True)
