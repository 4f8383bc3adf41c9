"""The command `visionaccel init`: projects to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visionaccel.backends import hookimpl
from visionaccel.cli.output import Json, print_json, results
from visionaccel_testing.templates import write_backend_project

init = typer.Typer(name="init", help="Start a project.", no_args_is_help=True)


@init.command()
def backend(
    name: Annotated[str, typer.Argument(help="The backend's name, such as acme_npu.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; by default visionaccel-NAME here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the plug-in project of a new backend. It runs as written: edit it, test it, publish it."""
    folder = output or Path(f"visionaccel-{name.replace('_', '-')}")
    written = write_backend_project(name, folder)
    if as_json:
        print_json({"backend": name, "folder": str(folder), "files": [str(path) for path in written]})
        return
    results.print(f"Wrote {folder}:", highlight=False, soft_wrap=True)
    for path in written:
        results.print(f"  {path.relative_to(folder)}", highlight=False, soft_wrap=True)
    results.print(f"Next: cd {folder}, pip install --editable '.[test]', pytest.", highlight=False, soft_wrap=True)


@hookimpl
def visionaccel_commands(app: typer.Typer) -> None:
    """Adds `visionaccel init`."""
    app.add_typer(init)
