"""The report of an encode benchmark: from the turns of every contender to figures, ratios and notes."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from visionaccel.core.cores import process_cores
from visionaccel.core.cpu import processor_name
from visionaccel.core.grid import Grid
from visionaccel.families import Tower
from visionaccel_bench.blocks import Seconds
from visionaccel_bench.encode.contenders import STOCK
from visionaccel_bench.encode.encoding import Accuracy, EncodePlan, Peak, Taken
from visionaccel_bench.encode.operations import count_operations

_BUSY = 1.2
"""If a contender's slowest turn takes more times as long as its fastest, a note says so."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The measured machine. `peak_operations_per_second` is by dtype, see `Peak`."""

    processor: str
    cores: int
    system: str
    peak_operations_per_second: dict[str, float]


@dataclass(frozen=True, slots=True)
class GridOperations:
    """What one encode of a grid takes: rows in, rows out, floating-point operations.

    `full_attention_share` of the operations are attention over whole frames.
    """

    grid: str
    patches: int
    tokens: int
    operations: int
    full_attention_share: float


@dataclass(frozen=True, slots=True)
class GridReport:
    """One contender on one grid.

    Attributes:
        median_seconds: The median of the turns' medians, from which rates are computed.
        rounds_seconds: The median of each turn.
        encodes: How many were timed.
        processors: Processors that were busy with it on average.
        share_of_peak: Operations a second divided by the machine's peak in its precision; None off the processor.
        times_stock: Its seconds divided by those of vLLM's tower in bfloat16: the median of the rounds' ratios.
        times_transformers: The same for transformers in its precision.
        accuracy: Compared with transformers in float32.
    """

    grid: str
    median_seconds: Seconds | None
    least_seconds: float | None
    most_seconds: float | None
    rounds_seconds: tuple[float, ...]
    encodes: int
    patches_per_second: float | None
    microseconds_per_patch: float | None
    processors: float | None
    share_of_peak: float | None
    times_stock: float | None
    times_transformers: float | None
    accuracy: Accuracy | None
    error: str | None


@dataclass(frozen=True, slots=True)
class ContenderReport:
    """One contender; see `Contender`, `Opened` and `Taken`."""

    label: str
    kind: str
    name: str
    device: str | None
    precision: str | None
    about: str | None
    simulated: bool
    startup_seconds: float | None
    resident_bytes: int | None
    peak_bytes: int | None
    grids: tuple[GridReport, ...]
    error: str | None

    def on(self, grid: str) -> GridReport | None:
        """Return its figures on a grid; None if it did not reach it."""
        return next((each for each in self.grids if each.grid == grid), None)


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """The whole report. `reference_error` says why accuracy was not measured; None if it was."""

    source: str
    plan: EncodePlan
    machine: Machine
    grids: tuple[GridOperations, ...]
    contenders: tuple[ContenderReport, ...]
    notes: tuple[str, ...]
    reference_error: str | None = None


def make_encode_report(
    source: str,
    tower: Tower,
    plan: EncodePlan,
    taken: Sequence[Taken],
    peak: Peak,
    reference_error: str | None = None,
) -> EncodeReport:
    """Make the report of what `measure_encodes` returned."""
    grids = []
    for grid in plan.grids:
        work, tokens = count_operations(tower.spec, [grid]), grid.tokens(tower.merge_size)
        grids.append(GridOperations(str(grid), grid.patches, tokens, work.total, work.full_attention_share))
    by_label = {each.contender.label: each for each in taken}
    contenders = tuple(_contender(each, by_label, plan.grids, grids, peak) for each in taken)
    system = f"{platform.platform()}, Python {platform.python_version()}"
    machine = Machine(processor_name(), len(process_cores()), system, peak.rates)
    notes = tuple(_notes(contenders, peak, plan, reference_error))
    return EncodeReport(source, plan, machine, tuple(grids), contenders, notes, reference_error)


def _contender(
    taken: Taken,
    others: Mapping[str, Taken],
    grids: Sequence[Grid],
    operations: Sequence[GridOperations],
    peak: Peak,
) -> ContenderReport:
    precision, device = taken.opened.get("precision"), taken.opened.get("device")
    best = peak.rates.get(precision) if device is not None and precision and device.lower() == "cpu" else None
    stock, same = others.get(STOCK.label), others.get(f"transformers {precision}")
    reports = []
    for grid, needs in zip(grids, operations, strict=True):
        if (found := taken.grids.get(grid)) is None:
            continue
        every = [seconds for turn in found.rounds for seconds in turn]
        turns = tuple(statistics.median(turn) for turn in found.rounds)
        median = statistics.median(turns) if turns else None
        report = GridReport(
            grid=needs.grid,
            median_seconds=median,
            least_seconds=min(every, default=None),
            most_seconds=max(every, default=None),
            rounds_seconds=turns,
            encodes=len(every),
            patches_per_second=None if median is None else needs.patches / median,
            microseconds_per_patch=None if median is None else 1e6 * median / needs.patches,
            processors=found.processor_seconds / sum(every) if every else None,
            share_of_peak=None if median is None or best is None else needs.operations / median / best,
            times_stock=_ratio(turns, stock, grid),
            times_transformers=_ratio(turns, same, grid),
            accuracy=found.accuracy,
            error=found.error,
        )
        reports.append(report)
    return ContenderReport(
        label=taken.contender.label,
        kind=taken.contender.kind,
        name=taken.contender.name,
        device=device,
        precision=precision,
        about=taken.opened.get("about"),
        simulated=bool(taken.opened.get("simulated")),
        startup_seconds=taken.startup_seconds,
        resident_bytes=taken.resident_bytes,
        peak_bytes=taken.peak_bytes,
        grids=tuple(reports),
        error=taken.error,
    )


def _ratio(turns: Sequence[float], other: Taken | None, grid: Grid) -> float | None:
    """Return the median of the rounds' ratios: what slows the machine down for a while slows both."""
    rounds = other.grids[grid].rounds if other is not None and grid in other.grids else []
    ratios = [ours / statistics.median(theirs) for ours, theirs in zip(turns, rounds, strict=False)]
    return statistics.median(ratios) if ratios else None


def _notes(
    contenders: Sequence[ContenderReport], peak: Peak, plan: EncodePlan, reference_error: str | None
) -> Iterator[str]:
    for each in contenders:
        if each.simulated:
            yield f"{each.label}: the device is SIMULATED; no hardware encodes, and its times are the configured ones."
    if peak.error is not None:
        yield f"The machine's peak is unknown, or known only in part: {peak.error}"
    if reference_error is not None:
        yield f"Accuracy is missing: transformers in float32, the reference, did not encode: {reference_error}"
    if plan.threads < len(process_cores()):
        yield f"Each contender had {plan.threads} of {len(process_cores())} cores."
    for each in contenders:
        spread = [max(grid.rounds_seconds) / min(grid.rounds_seconds) for grid in each.grids if grid.rounds_seconds]
        if max(spread, default=1.0) > _BUSY:
            yield (
                f"{each.label}: its slowest turn on a grid took {max(spread):.2f} times as long as its fastest, so the "
                "machine was busy with other work; trust the ratios more than the times, and pass more --rounds."
            )
