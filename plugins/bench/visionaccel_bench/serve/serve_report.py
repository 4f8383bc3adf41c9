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
    device_finish,
    figures,
    overlap,
    wall_seconds,
)
from visionaccel_bench.serve.serving import Plan, Taken


@dataclass(frozen=True, slots=True)
class ModeReport:
    """One server's figures.

    Attributes:
        encoder: What encoded, as the server's log says; None for stock vLLM and for a server that ran already.
        mixed: Text streams and image requests.
        text_only: The same text streams alone: what stalls without any image.
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
    """Image requests without text: all at once against one after the other in-line.

    Attributes:
        requests: How many.
        modes: The gain of each mode.
        prior_art_ratio: The published gain for `prior_art_requests` requests.
        prior_art_requests: How many those were.
    """

    requests: int
    modes: dict[str, Overlap]
    prior_art_ratio: float = PRIOR_ART_RATIO
    prior_art_requests: int = PRIOR_ART_REQUESTS


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found.

    Attributes:
        plan: What each server got.
        backend: Name of the backend that encoded; None if servers ran already.
        simulated: Whether the device is simulated; None if that is not known.
        device: How long the device takes.
        decode_how: How `decode_seconds` were measured; None if they were not.
        modes: The figures of each server.
        concurrency: Present if it was asked for.
        notes: What a reader must know.
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
    plan: Plan,
    taken: Mapping[str, Taken],
    at_no_cost: Mapping[str, Taken],
    device: DeviceTime,
    backend: str | None,
    simulated: bool | None,
) -> Report:
    """The report.

    Args:
        plan: What each server got.
        taken: The runs of each server.
        at_no_cost: The runs of their twins whose simulated device takes no time; empty if there are none.
        device: How long the device takes.
        backend: Name of the backend that encoded; None if servers ran already.
        simulated: Whether the device is simulated; None if that is not known.
    """
    decodes: dict[str, float] = {}
    together: dict[str, float] = {}
    for name, runs in taken.items():
        twin = at_no_cost.get(name)
        if name == Mode.STOCK:
            continue
        mixed, images = (twin.mixed, twin.together) if twin else (runs.mixed_again, runs.together_again)
        if mixed:
            decodes[name] = _wall(mixed)
        if images:
            together[name] = _wall(images)
    # One bound for all: a mode that makes decoding itself slower must not be measured against that.
    decode = min(decodes.values(), default=None)
    modes = {name: _mode(name, runs, decodes.get(name), decode, device) for name, runs in taken.items()}
    decode_how = None
    if decodes:
        decode_how = (
            "a second server of each mode, whose simulated device takes no time"
            if at_no_cost
            else "the same load again with the same images, which are then in every cache, that of prefixes too: a "
            "lower bound"
        )
    concurrency = _concurrency(plan, taken, min(together.values(), default=None), device) if plan.sequential else None
    return Report(
        plan, backend, simulated, device, decode_how, modes, concurrency, _notes(taken, modes, simulated, device)
    )


def _mode(name: str, taken: Taken, decode: float | None, least_decode: float | None, device: DeviceTime) -> ModeReport:
    mixed = figures(taken.mixed)
    ideal = None
    if name != Mode.STOCK and device.seconds_each is not None and least_decode is not None:
        ideal = bound(taken.mixed, device.seconds_each, least_decode)
    times = mixed.wall_seconds / ideal.seconds if ideal else None
    return ModeReport(taken.encoder, mixed, figures(taken.text_only), decode, ideal, times)


def _concurrency(plan: Plan, taken: Mapping[str, Taken], decode: float | None, device: DeviceTime) -> Concurrency:
    sequential = _wall(taken[Mode.INLINE].one_by_one)
    modes = {}
    for name, runs in taken.items():
        if runs.together:
            total = None
            if device.seconds_each is not None:
                total = statistics.median(device_finish(run, device.seconds_each) for run in runs.together)
            modes[name] = overlap(sequential, _wall(runs.together), total, decode)
    return Concurrency(plan.images, modes)


def _wall(runs: Sequence[Run]) -> float:
    return statistics.median(wall_seconds(run.traces) for run in runs)


def _notes(
    taken: Mapping[str, Taken], modes: Mapping[str, ModeReport], simulated: bool | None, device: DeviceTime
) -> tuple[str, ...]:
    notes = []
    if simulated:
        notes.append(
            "The device is SIMULATED: no hardware encodes, a call takes the configured time. Stock vLLM's own "
            "encoder does not take that time."
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
