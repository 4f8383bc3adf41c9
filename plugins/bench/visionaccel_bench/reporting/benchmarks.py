"""Benchmarks of either kind, from the JSON that they wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visionaccel.backends.spec import Status
from visionaccel.errors import InputError
from visionaccel_bench.encode.encode_report import EncodeReport
from visionaccel_bench.encode.placement import Placement
from visionaccel_bench.reporting.documents import checked, read_document
from visionaccel_bench.reporting.encode_bench import advice, encodes
from visionaccel_bench.reporting.markup import Html, element, joined
from visionaccel_bench.reporting.page import Section, worst
from visionaccel_bench.reporting.serve_bench import servers
from visionaccel_bench.serve.serve_report import Report as ServeReport

__all__ = ["Benchmark", "benchmarks_section", "read_benchmark"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: Of its file.
        encode: What `bench encode` or `bench placement` measured, if it was one of them.
        placements: What `bench placement` advised.
        serve: What `bench serve` measured, if it was that.
    """

    name: str
    encode: EncodeReport | None = None
    placements: tuple[Placement, ...] = ()
    serve: ServeReport | None = None


def read_benchmark(path: Path) -> Benchmark:
    """Read what a benchmark wrote with `--output` or `--json`.

    Raises:
        ConfigurationError: If the file cannot be read.
        InputError: If it is no benchmark of this visionaccel.
    """
    document = read_document(path)
    keys = set(document) if isinstance(document, Mapping) else set()
    if {"contenders", "grids"} <= keys:
        return Benchmark(path.name, encode=checked(EncodeReport, document, path, "what `bench encode` writes"))
    if {"placements", "measured"} <= keys:
        measured = checked(EncodeReport, document["measured"], path, "what `bench placement` writes")
        placements = checked(tuple[Placement, ...], document["placements"], path, "what `bench placement` writes")
        return Benchmark(path.name, encode=measured, placements=placements)
    if {"modes", "plan"} <= keys:
        return Benchmark(path.name, serve=checked(ServeReport, document, path, "what `bench serve` writes"))
    raise InputError(
        f"{path} is no benchmark.", hint="Name a file that `visionaccel bench encode` or `bench serve` wrote as JSON."
    )


def benchmarks_section(benchmarks: Sequence[Benchmark]) -> Section:
    """All benchmarks, one after the other."""
    parts: list[Html] = []
    statuses: list[Status] = []
    said = []
    for each in benchmarks:
        parts.append(element("h3", each.name))
        if each.encode is not None:
            failed = [one.label for one in each.encode.contenders if one.error or any(g.error for g in one.grids)]
            statuses.append("warning" if failed else "pass")
            said.append(f"{each.name}: {_encode_summary(each.encode, failed)}")
            parts.append(encodes(each.encode))
        if each.placements:
            parts.append(advice(each.placements))
        if each.serve is not None:
            statuses.append("pass")
            said.append(f"{each.name}: {_serve_summary(each.serve)}")
            parts.append(servers(each.serve))
    return Section("benchmarks", "Benchmarks", worst(statuses), "; ".join(said) + ".", joined(parts))


def _encode_summary(report: EncodeReport, failed: Sequence[str]) -> str:
    compared = f"{len(report.contenders)} contenders on {len(report.grids)} grids"
    return compared + (f", of which failed: {', '.join(failed)}" if failed else "")


def _serve_summary(report: ServeReport) -> str:
    walls = ", ".join(f"{name} {mode.mixed.wall_seconds:.2f} s" for name, mode in report.modes.items())
    return f"text and images together took {walls}" + (" (SIMULATED device)" if report.simulated else "")
