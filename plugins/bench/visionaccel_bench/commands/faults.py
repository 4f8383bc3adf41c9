"""`visionaccel faults`: faults planted in a simulated device behind real vLLM servers."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from visionaccel.cli.output import Json, check_writable, messages, print_json, results, status
from visionaccel.errors import ConfigurationError
from visionaccel_bench.blocks import print_blocks
from visionaccel_bench.commands.options import tidy_if_terminated, write_json
from visionaccel_bench.faultsuite.cells import FAULTS, MOMENTS, FaultSuite, Isolation, Mode, every_cell, fault_table


def faults(
    mode: Annotated[Mode | None, typer.Option(help="Test only servers in this mode.")] = None,
    isolation: Annotated[
        Isolation | None, typer.Option(help="Test only devices in the server's process (none) or in a child process.")
    ] = None,
    fallback: Annotated[
        bool | None,
        typer.Option("--with-fallback/--without-fallback", help="Test only servers with, or without, a fallback."),
    ] = None,
    fault: Annotated[list[str] | None, typer.Option(help="Plant only this fault; repeatable.")] = None,
    moment: Annotated[list[str] | None, typer.Option(help="Plant faults only at this moment; repeatable.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the outcomes to this JSON file, for `visionaccel report --faults`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plant faults in a simulated device behind real vLLM servers, and show how every request was answered.

    The servers serve the digits model on loopback, and answers are compared token by token with stock vLLM's. A cell
    passes if the fault occurred, the affected request got the correct answer from the fallback (or, without a fallback,
    an error that says why), all other requests got the correct answer, no request was lost, the device answers again
    once the fault is removed, and no wrong result was kept. All cells take about ten minutes. The exit status is 1 if a
    cell did not pass.
    """
    from visionaccel_bench.faultsuite.suite import SuiteImages, images_needed, run_suite

    for option, given, known in (("--fault", fault, FAULTS), ("--moment", moment, MOMENTS)):
        for name in given or ():
            if name not in known:
                raise ConfigurationError(f"unknown {option} {name!r}.", hint=f"Choose one of: {', '.join(known)}.")
    check_writable(output)
    cells = [
        cell
        for cell in every_cell()
        if mode in (None, cell.serving.mode)
        and isolation in (None, cell.serving.isolation)
        and fallback in (None, cell.serving.fallback)
        and (not fault or cell.fault in fault)
        and (not moment or cell.moment in moment)
    ]
    if not cells:
        raise ConfigurationError("no cell matches these options.", hint="Leave out some of them.")
    created = datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    with tidy_if_terminated(), status("starting") as tell:
        images = SuiteImages.asked_of_stock(images_needed(cells), tell)
        with closing(run_suite(cells, images, tell)) as outcomes:
            for cell, row in outcomes:
                rows.append(row)
                if not row.passed:
                    messages.print(f"FAILED {cell}: {row.detail}", highlight=False, soft_wrap=True)
    document = asdict(FaultSuite(created=created, simulated=True, rows=tuple(rows)))
    write_json(document, output)
    failed, missing = sum(not row.passed for row in rows), len(cells) - len(rows)
    if as_json:
        print_json(document)
    else:
        table = fault_table(rows, without=("expected", "wrong", "detail"), title="Faults of a SIMULATED device")
        print_blocks([table])
        lost, wrong = sum(row.lost for row in rows), sum(row.wrong for row in rows)
        counts = f"{len(rows)} cells, {failed} failed, {missing} not run"
        results.print(f"{counts}; {lost} requests lost, {wrong} answers wrong.")
    if failed or missing:
        raise typer.Exit(1)
