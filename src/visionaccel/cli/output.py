"""Where the command prints: results on stdout, everything else on stderr; and the arguments that commands share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

from visionaccel.errors import ConfigurationError, SettingsError
from visionaccel.setting_values import parse_options

__all__ = [
    "Backend", "Device", "Json", "OptionsText", "backend_options", "check_writable", "finite", "messages", "number",
    "print_json", "progress", "results", "write_json",
]  # fmt: skip

results = Console(soft_wrap=False, markup=False, emoji=False)
"""Tables and answers. Text is printed as it is: names and messages from files and plug-ins are no markup."""

messages = Console(stderr=True)
"""Progress, warnings and errors."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Backend = Annotated[
    str | None, typer.Option(help="A backend's name or 'auto'. Default: VISIONACCEL_BACKEND, or 'auto'.")
]
Device = Annotated[
    str | None, typer.Option(help="The backend's device. Default: VISIONACCEL_DEVICE, or the backend's own.")
]
OptionsText = Annotated[
    str | None, typer.Option("--options", help="Backend options: name=value,name=value or a JSON object.")
]


@contextmanager
def progress(amount: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr, one for each stage; the function tells a stage, how much of it is done and how much it is.

    Args:
        amount: The column that says how much is done.
    """
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=messages, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
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
                f"{file} is no file in a folder that exists.", hint="Name a file in a folder that exists."
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


def number(value: float | None) -> str:
    """Two places after the point; a dash for nothing."""
    return "-" if value is None else f"{value:.2f}"


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1, default=str))
