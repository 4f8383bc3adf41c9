"""The report of a serving benchmark: from the runs of every server to figures, bounds and notes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visionaccel_bench.serve.device import DeviceTime, Mode
from visionaccel_bench.serve.figures import (
    PRIOR_ART_RATIO,
    PRIOR_ART_REQUESTS,
    Bound,
    Figures,
    Overlap,
    Run,
    bound,
    figures,
    overlap,
    wall_seconds,
)
from visionaccel_bench.serve.serving import Plan, Taken


@dataclass(frozen=True, slots=True)
class ModeReport:
    """One server's figures of the mixed load and of its text streams alone.

    Attributes:
        encoder: What encoded, as the server's log says; None for stock vLLM and for a server that ran already.
        decode_seconds: Wall of the mixed load where images cost the device nothing; None where it was not measured.
        bound: What an ideal server would need for the mixed load; None for stock vLLM, whose encoder does not run on
            the device, and where the device's time is not known.
        times_bound: The mixed load's wall by that bound.
    """

    encoder: str | None
    mixed: Figures
    text_only: Figures
    decode_seconds: float | None
    bound: Bound | None
    times_bound: float | None


@dataclass(frozen=True, slots=True)
class Concurrency:
    """That many image requests without text, all at once against one after the other in-line, with each mode's gain.

    The prior art is the published gain for that many requests.
    """

    requests: int
    modes: dict[str, Overlap]
    prior_art_ratio: float = PRIOR_ART_RATIO
    prior_art_requests: int = PRIOR_ART_REQUESTS


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found. `backend` and `simulated` are None if servers ran already.

    `decode_how` says how `decode_seconds` were measured, if they were; `modes` has the figures of each server.
    """

    plan: Plan
    backend: str | None
    simulated: bool | None
    device: DeviceTime
    decode_how: str | None
    modes: dict[str, ModeReport]
    concurrency: Concurrency | None
    notes: tuple[str, ...]


def make_report(
    plan: Plan, taken: Mapping[str, Taken], device: DeviceTime, backend: str | None, simulated: bool | None
) -> Report:
    """The report of the runs of each server; see `Report`."""
    decodes = {name: _wall(runs.mixed_free) for name, runs in taken.items() if runs.mixed_free}
    # One bound for all: a mode that makes decoding itself slower must not be measured against that.
    decode = min(decodes.values(), default=None)
    modes = {name: _mode(name, runs, decodes.get(name), decode, device) for name, runs in taken.items()}
    decode_how = None
    if decodes:
        decode_how = (
            "a second server of each mode, whose simulated device takes no time"
            if simulated
            else "the same load again with the same images, which are then in every cache, that of prefixes too: a "
            "lower bound"
        )
    concurrency = _concurrency(plan, taken, device) if plan.sequential else None
    return Report(
        plan, backend, simulated, device, decode_how, modes, concurrency, _notes(taken, modes, simulated, device)
    )


def _mode(name: str, taken: Taken, decode: float | None, least_decode: float | None, device: DeviceTime) -> ModeReport:
    mixed = figures(taken.mixed)
    ideal = None if name == Mode.STOCK else _ideal(taken.mixed, least_decode, device)
    times = mixed.wall_seconds / ideal.seconds if ideal else None
    return ModeReport(taken.encoder, mixed, figures(taken.text_only), decode, ideal, times)


def _concurrency(plan: Plan, taken: Mapping[str, Taken], device: DeviceTime) -> Concurrency:
    sequential = _wall(taken[Mode.INLINE].one_by_one)
    decode = min((_wall(runs.together_free) for runs in taken.values() if runs.together_free), default=None)
    modes = {
        name: overlap(sequential, _wall(runs.together), _ideal(runs.together, decode, device))
        for name, runs in taken.items()
        if runs.together
    }
    return Concurrency(plan.images, modes)


def _ideal(runs: Sequence[Run], decode: float | None, device: DeviceTime) -> Bound | None:
    return None if device.seconds_each is None or decode is None else bound(runs, device.seconds_each, decode)


def _wall(runs: Sequence[Run]) -> float:
    return statistics.median(wall_seconds(run.traces) for run in runs)


def _notes(
    taken: Mapping[str, Taken], modes: Mapping[str, ModeReport], simulated: bool | None, device: DeviceTime
) -> tuple[str, ...]:
    notes = []
    if simulated:
        notes.append(
            "The device is SIMULATED: no hardware encodes, a call takes the configured time. Stock vLLM's encoder "
            "does not take that time."
        )
    elif simulated is None:
        notes.append("It is not known whether the devices of running servers are simulated.")
    if device.seconds_each is None:
        notes.append("The device's time is not known, so there is no bound; pass --device-seconds.")
    for name, runs in taken.items():
        if runs.overran:
            notes.append(f"{name}: the simulated device computed for longer than its latency; pass a longer one.")
        times = modes[name].times_bound
        if times is not None and times < 1:
            notes.append(
                f"{name}: faster than the bound, so the machine was busier while decode was measured; pass more "
                "--repeats."
            )
        pauses = modes[name].mixed.client_pause_seconds
        if pauses > 0:
            notes.append(
                f"{name}: the client itself did not run for {pauses:.2f} s, because the machine was busy: the server "
                "may have stalled less than it seems, and been faster."
            )
        if modes[name].mixed.covered is False:
            notes.append(
                f"{name}: the text streams ended before the last image's first token, so that some stalls could not "
                "show; pass more --stream-tokens."
            )
    return tuple(notes)
