"""Where the encoder should run on this machine: offloaded to a backend, or left to vLLM.

In-line, the engine's step waits for the encode: offloading gains the time by which the encode becomes shorter.
Pipelined, the language model decodes during the encode, but an encoder that computes on the host takes processor time
from it: offloading gains stock's seconds, in which the engine does nothing else, minus the seconds for which the
encoder's processor time would occupy all cores. The answer about an image waits for the whole encode in either mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visionaccel.core.comparison import THRESHOLDS
from visionaccel_bench.encode.encode_report import ContenderReport, EncodeReport

MARGIN = 0.1
"""The smallest gain that counts, as a share of stock's seconds: less is within the spread of such measurements."""

LEAST_COSINE = THRESHOLDS["bfloat16"]
"""Embeddings are wrong if the cosine of any token is below it."""

_OFF_HOST = 0.25
"""An encoder that takes a smaller share of the cores leaves the language model enough."""


@dataclass(frozen=True, slots=True)
class GridPlacement:
    """The encode of one image of a grid: the seconds of vLLM's tower, of the backend, and what offloading gains.

    Attributes:
        host_seconds: Seconds for which the backend's processor time would occupy all cores.
        inline_gain_seconds: By how much shorter the engine's step becomes; negative if longer.
        pipelined_gain_seconds: By how much longer the language model has the machine.
    """

    grid: str
    stock_seconds: float
    offloaded_seconds: float
    host_seconds: float
    inline_gain_seconds: float
    pipelined_gain_seconds: float


@dataclass(frozen=True, slots=True)
class ModeAdvice:
    """Whether to offload in one mode, None if unknown; and why, with the numbers."""

    offload: bool | None
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The advice for one backend.

    Attributes:
        label: The backend with its device and options.
        processors: Processors that its encodes keep busy; None if it was not measured.
        takes_language_models_cores: Whether that is a quarter of the machine's or more.
    """

    label: str
    grids: tuple[GridPlacement, ...]
    processors: float | None
    takes_language_models_cores: bool | None
    inline: ModeAdvice
    pipelined: ModeAdvice


@dataclass(frozen=True, slots=True)
class PlacementReport:
    """The advice for each backend, and the measurements behind it."""

    placements: tuple[Placement, ...]
    measured: EncodeReport


def advise(report: EncodeReport, backend: ContenderReport, stock: ContenderReport) -> Placement:
    """Advise whether to offload to a backend, from one run in which it and stock vLLM's tower encoded the same grids.

    The seconds of all grids are added up.
    """
    cores = report.plan.threads
    grids = []
    for ours in backend.grids:
        theirs = stock.on(ours.grid)
        if ours.median_seconds is None or theirs is None or theirs.median_seconds is None:
            continue
        mine, vllms = ours.median_seconds, theirs.median_seconds
        host = mine * min((ours.processors or 0.0) / cores, 1.0)
        grids.append(GridPlacement(ours.grid, vllms, mine, host, vllms - mine, vllms - host))
    if not grids:
        errors = [
            f"{each.label}: {error}"
            for each in (stock, backend)
            if (error := each.error or next((grid.error for grid in each.grids if grid.error), None)) is not None
        ]
        unknown = ModeAdvice(None, f"it cannot be compared. {' '.join(errors)}")
        return Placement(backend.label, (), None, None, unknown, unknown)
    processors = cores * sum(grid.host_seconds for grid in grids) / sum(grid.offloaded_seconds for grid in grids)
    takes = processors >= _OFF_HOST * cores
    refusal = _refusal(report, backend, [grid.grid for grid in grids])
    inline, pipelined = refusal or _inline(grids), refusal or _pipelined(grids, processors, cores, takes)
    return Placement(backend.label, tuple(grids), processors, takes, inline, pipelined)


def _refusal(report: EncodeReport, backend: ContenderReport, compared: Sequence[str]) -> ModeAdvice | None:
    """Return a reason not to offload, or not to advise, that no time can outweigh, or None."""
    failed = next((grid for grid in backend.grids if grid.error is not None), None)
    if failed is not None:
        return ModeAdvice(False, f"do not: it fails on grid {failed.grid}: {failed.error}")
    accuracies = {grid.grid: grid.accuracy for grid in backend.grids if grid.grid in compared}
    for grid, accuracy in accuracies.items():
        if accuracy is not None and not accuracy.lowest_cosine >= LEAST_COSINE:  # also if it is NaN
            return ModeAdvice(
                False,
                f"do not: its embeddings are wrong. The lowest cosine of a token to transformers in float32 is "
                f"{accuracy.lowest_cosine:.4f} on grid {grid}; the minimum is {LEAST_COSINE}.",
            )
    if backend.simulated:
        return ModeAdvice(None, "its device is SIMULATED, and takes the configured time.")
    for grid, accuracy in accuracies.items():
        if accuracy is None:
            why = f" ({report.reference_error})" if report.reference_error else ""
            return ModeAdvice(
                None, f"its embeddings on grid {grid} were not compared with transformers' in float32{why}."
            )
    return None


def _inline(grids: Sequence[GridPlacement]) -> ModeAdvice:
    stock, ours = sum(grid.stock_seconds for grid in grids), sum(grid.offloaded_seconds for grid in grids)
    times = f"an encode takes {_seconds(ours)} instead of vLLM's {_seconds(stock)} ({ours / stock:.2f} times)"
    over = "" if len(grids) == 1 else f", all {len(grids)} grids together"
    if ours <= stock * (1 - MARGIN):
        slower = [grid.grid for grid in grids if grid.inline_gain_seconds < 0]
        but = f", though not on {', '.join(slower)}" if slower else ""
        return ModeAdvice(True, f"offload: {times}{over}; each step with an image is that much shorter{but}.")
    if ours < stock:
        return ModeAdvice(False, f"do not: {times}{over}, and a gain under {MARGIN:.0%} is within the spread.")
    return ModeAdvice(False, f"do not: {times}{over}, and the engine's step waits for it.")


def _pipelined(grids: Sequence[GridPlacement], processors: float, cores: int, takes: bool) -> ModeAdvice:
    stock, ours = sum(grid.stock_seconds for grid in grids), sum(grid.offloaded_seconds for grid in grids)
    host = sum(grid.host_seconds for grid in grids)
    cores_taken = (
        f"the encoder takes the language model's cores ({processors:.1f} of {cores})"
        if takes
        else f"the encoder leaves the language model its cores (it keeps {processors:.1f} of {cores} busy)"
    )
    costs = f"it costs {_seconds(host)} of the whole machine's time, stock vLLM's encode {_seconds(stock)}"
    if host > stock * (1 - MARGIN):
        why = "is longer" if host > stock else f"gains under {MARGIN:.0%}"
        return ModeAdvice(
            False,
            f"do not: {cores_taken}, and {costs}, so it {why}. Text streams would no longer stall while an image is "
            "encoded, but all tokens together would come no sooner.",
        )
    later = (
        f" The first token about an image comes later, though: its encode takes {_seconds(ours)} instead of "
        f"{_seconds(stock)}."
        if ours > stock
        else ""
    )
    return ModeAdvice(True, f"offload: {cores_taken}, and {costs}.{later}")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1e3 * value:.1f} ms"
