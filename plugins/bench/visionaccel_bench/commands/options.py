"""Options that several commands have, what must be importable for them, and how SIGTERM ends them."""

from __future__ import annotations

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

Output = Annotated[Path | None, typer.Option(help="Write the JSON to this file too.")]


def duration(help: str, *, least: float = 0.0, **given: Any) -> Any:  # noqa: A002 # typer's word
    """A `typer.Option` of seconds, up to a day."""
    return typer.Option(min=least, max=86_400, callback=finite, help=help, **given)


def require(*modules: str) -> None:
    """Import modules before anything is started; a `ConfigurationError` if one cannot be imported."""
    for module in modules:
        try:
            import_module(module.partition(".")[0])  # whose absence a loaded module would hide
            import_module(module)
        except Exception as error:  # a broken installation fails in any way
            raise ConfigurationError(
                f"this command needs {module}, which cannot be imported: {type(error).__name__}: {error}",
                hint=f"Run pip install 'visionaccel[bench]'; `python -c 'import {module}'` must succeed.",
            ) from error


@contextmanager
def tidy_if_terminated() -> Iterator[None]:
    """While the context lasts, SIGTERM ends the command as Ctrl-C does: it ends what it started and removes its files.

    For what waits for other processes: a device that hangs in this process would keep the signal from being handled.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except _Terminated:
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """Passes through everything that lets Ctrl-C pass."""


def _terminated(number: int, _: FrameType | None) -> None:
    signal.signal(number, lambda *_: None)  # a second one must not end the tidying
    raise _Terminated
