"""`visionaccel report`: one page of findings, certificates and measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visionaccel.cli.diagnosis import diagnose
from visionaccel.cli.output import Json, check_writable, print_json, results, status
from visionaccel.errors import ConfigurationError


def report(
    output: Annotated[Path, typer.Argument(help="The HTML file to write.")],
    source: Annotated[
        str | None, typer.Option(help="Bundle or checkpoint to examine; a bundle's certificate is shown.")
    ] = None,
    bench: Annotated[
        list[Path] | None,
        typer.Option(help="JSON of `bench encode`, `bench placement` or `bench serve`; repeatable."),
    ] = None,
    trace: Annotated[
        list[Path] | None, typer.Option(help="File that VISIONACCEL_TRACE wrote, drawn as a timeline; repeatable.")
    ] = None,
    faults: Annotated[Path | None, typer.Option(help="JSON of `faults --output`.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "visionaccel report",
    no_vllm: Annotated[bool, typer.Option("--no-vllm", help="Do not examine vLLM; its import takes seconds.")] = False,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: doctor's findings, a certificate, benchmarks, timelines, faults.

    The page has no script and loads nothing, so it can be sent and read anywhere. The summary at the top lists the
    worst first. Doctor examines the machine that this command runs on.
    """
    from visionaccel_bench.reporting.inputs import read_inputs
    from visionaccel_bench.reporting.page import make_report  # slow to import

    check_writable(output)
    inputs = read_inputs(source, bench or (), trace or (), faults)
    with status("examining this machine"):
        found = diagnose(source, vllm=not no_vllm)
    made = make_report(inputs, found, title)
    try:
        output.write_text(made.page(), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error}", hint="Pass a different file.") from error
    if as_json:
        sections = [{"section": each.key, "status": each.status, "summary": each.summary} for each in made.sections]
        print_json({"report": str(output), "status": made.status, "sections": sections})
        return
    for each in made.sections:
        results.print(f"{each.title}: {each.status}: {each.summary}", soft_wrap=True)
    results.print(f"The report is in {output}.", soft_wrap=True)
