"""A report from its inputs: first all files are read, then this machine is looked at, then the page is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visionaccel.cli.diagnosis import Diagnosis
from visionaccel_bench.reporting.benchmarks import Benchmark, benchmarks_section, read_benchmark
from visionaccel_bench.reporting.faults import FaultSuite, faults_section, read_faults
from visionaccel_bench.reporting.health import certificate_section, doctor_section
from visionaccel_bench.reporting.page import Report, Section
from visionaccel_bench.reporting.timelines import timelines_section
from visionaccel_bench.reporting.trace import Trace, read_trace

__all__ = ["Inputs", "make_report", "read_inputs"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a report is made of, beside the machine that it is made on.

    Attributes:
        source: A bundle or checkpoint; None for none.
        benchmarks: What was measured.
        traces: Recorded traces with the names of their files.
        faults: A fault suite; None for none.
    """

    source: str | None
    benchmarks: tuple[Benchmark, ...]
    traces: tuple[tuple[str, Trace], ...]
    faults: FaultSuite | None


def read_inputs(
    source: str | None = None, benchmarks: Sequence[Path] = (), traces: Sequence[Path] = (), faults: Path | None = None
) -> Inputs:
    """Read every file.

    Args:
        source: A bundle or checkpoint.
        benchmarks: Files of `bench encode`, `bench placement` and `bench serve`.
        traces: Traces.
        faults: The file of a fault suite.

    Raises:
        ConfigurationError: If a file cannot be read.
        InputError: If one is not what it should be.
    """
    return Inputs(
        source,
        tuple(map(read_benchmark, benchmarks)),
        tuple((path.name, read_trace(path)) for path in traces),
        None if faults is None else read_faults(faults),
    )


def make_report(inputs: Inputs, found: Diagnosis, title: str) -> Report:
    """The report of what was read and of what was found."""
    sections: list[Section] = [doctor_section(found)]
    if inputs.source is not None:
        sections.append(certificate_section(inputs.source))
    if inputs.benchmarks:
        sections.append(benchmarks_section(inputs.benchmarks))
    if inputs.traces:
        sections.append(timelines_section(inputs.traces))
    if inputs.faults is not None:
        sections.append(faults_section(inputs.faults))
    return Report(title, found.created, found.version, tuple(sections))
