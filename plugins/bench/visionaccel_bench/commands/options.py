"""Options that several of these commands have."""

from __future__ import annotations

from importlib.util import find_spec
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
    """Check that modules are there, before anything is started.

    Raises:
        ConfigurationError: If one is not.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ConfigurationError.missing_extra("this command", module, "visionaccel[bench]")
