"""Options that several of these commands have."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from visionaccel.cli.output import finite
from visionaccel.errors import ConfigurationError

Output = Annotated[Path | None, typer.Option(help="Write the JSON to this file too.")]


def duration(help: str, *, least: float = 0.0, **given: Any) -> Any:  # noqa: A002 # typer's word
    """A `typer.Option` of seconds, up to a day."""
    return typer.Option(min=least, max=86_400, callback=finite, help=help, **given)


def require(*modules: str) -> None:
    """Import modules before anything is started.

    Raises:
        ConfigurationError: If one is not installed, or cannot be imported.
    """
    for module in modules:
        package = module.partition(".")[0]
        try:
            import_module(package)
            import_module(module)
        except Exception as error:  # a broken installation fails in any way
            if isinstance(error, ModuleNotFoundError) and error.name == package:
                raise ConfigurationError.missing_extra("this command", package, "visionaccel[bench]") from error
            raise ConfigurationError(
                f"this command needs {module}, which cannot be imported: {type(error).__name__}: {error}",
                hint=f"Install it again until `python -c 'import {module}'` succeeds.",
            ) from error
