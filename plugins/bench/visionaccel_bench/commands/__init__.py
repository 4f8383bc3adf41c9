"""The commands that this distribution adds to `visionaccel`."""

from __future__ import annotations

import typer

from visionaccel.backends import hookimpl

__all__ = ["visionaccel_commands"]


@hookimpl
def visionaccel_commands(app: typer.Typer) -> None:
    """Adds `bench`, `demo`, `faults` and `report`."""
    # Imported here: at the top, these functions would shadow the modules of the same names.
    from visionaccel_bench.commands.bench import bench
    from visionaccel_bench.commands.demo import demo
    from visionaccel_bench.commands.faults import faults
    from visionaccel_bench.commands.report import report

    for command in (report, faults, demo):
        app.command()(command)
    app.add_typer(bench)
