"""Where the command prints: results on stdout, everything else on stderr; and the arguments that commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

from visionaccel.errors import SettingsError
from visionaccel.settings import parse_options

__all__ = [
    "Backend", "Device", "Json", "OptionsText", "backend_options", "messages", "print_json", "progress", "results",
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


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1, default=str))
