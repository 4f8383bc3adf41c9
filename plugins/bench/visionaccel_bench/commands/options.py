"""Options of several commands, the imports that they need, and how SIGTERM ends them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from visionaccel.cli.output import finite
from visionaccel.errors import ConfigurationError

Output = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]


def duration(help: str, *, least: float = 0.0, **given: Any) -> Any:  # noqa: A002 # typer's word
    """Make a `typer.Option` of seconds, up to a day."""
    return typer.Option(min=least, max=86_400, callback=finite, help=help, **given)


def write_json(value: Any, file: Path | None) -> None:
    """Write a document as `print_json` prints it into a file, if one is given."""
    if file is None:
        return
    try:
        file.write_text(json.dumps(value, indent=1, default=str) + "\n")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written: {error}", hint="Pass a different file.") from error


def require(*modules: str) -> None:
    """Import modules before anything is started; ConfigurationError if one cannot be imported."""
    for module in modules:
        try:
            import_module(module.partition(".")[0])  # a loaded submodule would hide that its package is missing
            import_module(module)
        except Exception as error:  # a broken installation can raise anything
            raise ConfigurationError(
                f"this command needs {module}, which cannot be imported: {type(error).__name__}: {error}",
                hint=f"Run pip install 'visionaccel[bench]'; `python -c 'import {module}'` must succeed.",
            ) from error


@contextmanager
def tidy_if_terminated() -> Iterator[None]:
    """While the context lasts, SIGTERM ends the command as Ctrl-C does: it ends its processes and removes its files.

    For commands that wait for other processes: while a device hangs in this process, the signal is not handled.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except _Terminated:
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """Not caught where Ctrl-C is not."""


def _terminated(number: int, _: FrameType | None) -> None:
    signal.signal(number, lambda *_: None)  # a second signal must not interrupt the clean-up
    raise _Terminated
