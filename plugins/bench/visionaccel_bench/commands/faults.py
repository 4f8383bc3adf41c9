"""`visionaccel faults`: faults planted in a simulated device behind real vLLM servers."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from visionaccel.cli.output import Json, check_writable, messages, print_json, results, status, write_json
from visionaccel.errors import ConfigurationError
from visionaccel_bench.commands.termination import tidy_if_terminated
from visionaccel_bench.faultsuite.matrix import FAULTS, MOMENTS, Cell, cells_of, every_serving

__all__ = ["faults"]


def faults(
    mode: Annotated[str | None, typer.Option(help="Only servers of this mode: inline or pipelined.")] = None,
    isolation: Annotated[
        str | None, typer.Option(help="Only devices that live there: none (the server's process) or process.")
    ] = None,
    fallback: Annotated[
        bool | None, typer.Option("--with-fallback/--without-fallback", help="Only servers with, or without, one.")
    ] = None,
    fault: Annotated[list[str] | None, typer.Option(help="Only this fault; repeatable.")] = None,
    moment: Annotated[list[str] | None, typer.Option(help="Only this moment; repeatable.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the outcomes to this JSON file, for `visionaccel report --faults`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plant faults in a SIMULATED device behind real vLLM servers, and show what became of every request.

    The servers serve the digits model on loopback, and answers are compared token by token with stock vLLM's. A cell
    passes if the fault struck; if what it struck was answered rightly by the fallback, or without one by an error that
    says why; if nothing was lost; if the neighbours were answered rightly; if the device answers again once the fault
    is lifted; and if nothing wrong was kept. Takes about ten minutes in all. Exit status 1 if a cell did not pass.
    """
    from visionaccel_bench.faultsuite.suite import Outcome, SuiteImages, as_document, images_needed, run_suite

    for given, known in ((fault, FAULTS), (moment, MOMENTS), ([mode] if mode else None, ("inline", "pipelined")),
                         ([isolation] if isolation else None, ("none", "process"))):  # fmt: skip
        for name in given or ():
            if name not in known:
                raise ConfigurationError(f"there is no {name!r}.", hint=f"Name one of: {', '.join(known)}.")
    check_writable(output)

    def wanted(cell: Cell) -> bool:
        serving = cell.serving
        return (
            mode in (None, serving.mode)
            and isolation in (None, serving.isolation)
            and fallback in (None, serving.fallback)
            and (not fault or cell.fault in fault)
            and (not moment or cell.moment in moment)
        )

    servings = every_serving()
    count = images_needed(servings, wanted)
    if not count:
        raise ConfigurationError("no cell is like that.", hint="Leave out some of the options.")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    with tidy_if_terminated(), status("starting") as tell:

        def done(outcome: Outcome) -> None:
            if outcome.problems:
                cell = outcome.cell
                messages.print(
                    f"FAILED {cell.fault}, {cell.moment}: {cell.serving}: {' '.join(outcome.problems)}",
                    highlight=False,
                    soft_wrap=True,
                )

        images = SuiteImages.asked_of_stock(count, tell)
        outcomes = run_suite(servings, images, wanted=wanted, tell=tell, done=done)
    document = as_document(outcomes, created)
    write_json(document, output)
    failed = [outcome for outcome in outcomes if outcome.problems]
    missing = sum(map(wanted, (cell for serving in servings for cell in cells_of(serving)))) - len(outcomes)
    if as_json:
        print_json(document)
    else:
        results.print(_table(document["rows"]))
        lost, wrong = (sum(row[name] for row in document["rows"]) for name in ("lost", "wrong"))
        counts = f"{len(outcomes)} cells, {len(failed)} failed, {missing} not run"
        results.print(f"{counts}; {lost} requests lost, {wrong} answers wrong.")
    if failed or missing:
        raise typer.Exit(1)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Faults of a SIMULATED device", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("fault", "moment", "mode", "isolation", "fallback", "answered", "lost", "recovery s", "passed"):
        table.add_column(name, justify="right" if name in ("lost", "recovery s") else "left")
    for row in rows:
        recovery = row["recovery_seconds"]
        table.add_row(
            row["fault"],
            row["moment"],
            row["mode"],
            row["isolation"],
            "yes" if row["fallback"] else "none",
            row["answered"],
            str(row["lost"]),
            "-" if recovery is None else f"{recovery:.2f}",
            "yes" if row["passed"] else "NO",
            style=None if row["passed"] else "bold red",
        )
    return table
