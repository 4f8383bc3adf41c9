"""The report of a serving benchmark: from time stamps of requests to figures, bounds and notes. Times are seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from visionaccel_bench.blocks import Seconds
from visionaccel_bench.serve.device import DeviceTime, Mode
from visionaccel_bench.serve.load import STALL, Run, Trace
from visionaccel_bench.serve.serving import Plan, Taken

PRIOR_ART_RATIO, PRIOR_ART_REQUESTS = 1.66, 3
"""Published: three image requests, 120.29 s one after the other and 72.42 s with encoding and decoding overlapped by a
rewritten vLLM scheduler (on a real NPU, with another model)."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of some times."""

    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, times: Iterable[float]) -> Self | None:
        """Return the percentiles, or None for an empty list."""
        found = list(times)
        return cls(*map(float, np.percentile(found, (50, 90, 99, 100)))) if found else None


@dataclass(frozen=True, slots=True)
class Latencies:
    """Time to first token and inter-token latency of the requests of one kind."""

    ttft_seconds: Spread | None
    itl_seconds: Spread | None


@dataclass(frozen=True, slots=True)
class Stalls:
    """Gaps of text streams over `STALL`: sum and number, each the mean of the repetitions, and the longest gap."""

    seconds: Seconds
    number: float
    longest_seconds: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of all repetitions of one load. Those of requests that it does not have are None.

    Attributes:
        wall_seconds: From the first request sent to the last token; the median of the repetitions.
        tokens_per_second: Tokens of all requests divided by the wall seconds of all repetitions.
        image_requests_per_second: Image requests divided by the seconds from the first one sent to the last token of
            any.
        covered: Whether in each repetition a text stream lasted until every image request had its first token. If
            not, some stalls had no stream to show in.
        client_pause_seconds: The client's pauses over `STALL`; the mean of the repetitions.
    """

    wall_seconds: Seconds
    wall_seconds_each: tuple[float, ...]
    tokens_per_second: float
    image_requests_per_second: float | None
    text: Latencies | None
    images: Latencies | None
    stalls: Stalls | None
    covered: bool | None
    client_pause_seconds: float


@dataclass(frozen=True, slots=True)
class Bound:
    """What an ideal server would need for a load: no schedule on the same device and language model takes less.

    It is the larger of the time at which the device can be done, see `device_finish`, and of the load's wall where
    images cost the device nothing. The time from then until the last image is answered is not added.
    """

    device_seconds: float
    decode_seconds: float
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class Overlap:
    """Walls of image requests one after the other and all at once, their ratio, and an ideal server's if known."""

    sequential_seconds: float
    concurrent_seconds: float
    ratio: float
    bound: float | None


@dataclass(frozen=True, slots=True)
class ModeReport:
    """One server's figures of the mixed load and of its text streams alone.

    Attributes:
        encoder: What encoded, from the server's log; None for stock vLLM and for a server that was already running.
        decode_seconds: Wall of the mixed load where images cost the device nothing; None if it was not measured.
        bound: The bound of the mixed load; None for stock vLLM, whose encoder does not run on the device, and if the
            device's time is unknown.
        times_bound: The mixed load's wall divided by that bound.
    """

    encoder: str | None
    mixed: Figures
    text_only: Figures
    decode_seconds: float | None
    bound: Bound | None
    times_bound: float | None


@dataclass(frozen=True, slots=True)
class Concurrency:
    """The gain of each mode from image requests without text that are sent at once, and the published one."""

    requests: int
    modes: dict[str, Overlap]
    prior_art_ratio: float = PRIOR_ART_RATIO
    prior_art_requests: int = PRIOR_ART_REQUESTS


@dataclass(frozen=True, slots=True)
class Report:
    """The whole report. `backend` and `simulated` are None if the servers were already running.

    `decode_how` says how `decode_seconds` were measured; None if they were not.
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
    """Make the report of the runs of each server."""
    decodes = {name: _wall(runs.mixed_free) for name, runs in taken.items() if runs.mixed_free}
    # One bound for all: a mode that makes decoding itself slower must not be measured against that.
    decode = min(decodes.values(), default=None)
    modes = {}
    for name, runs in taken.items():
        mixed = figures(runs.mixed)
        ideal = None if name == Mode.STOCK else bound(runs.mixed, device.seconds_each, decode)
        times = mixed.wall_seconds / ideal.seconds if ideal else None
        modes[name] = ModeReport(runs.encoder, mixed, figures(runs.text_only), decodes.get(name), ideal, times)
    decode_how = None
    if decodes:
        decode_how = (
            "a second server of each mode, whose simulated device takes no time"
            if simulated
            else "the same load again with the same images, which are then in every cache, that of prefixes too: a "
            "lower bound"
        )
    concurrency = _concurrency(plan, taken, device) if plan.sequential else None
    notes = tuple(_notes(taken, modes, simulated, device))
    return Report(plan, backend, simulated, device, decode_how, modes, concurrency, notes)


def figures(runs: Sequence[Run]) -> Figures:
    """Compute the figures of the repetitions of one load, of which there is at least one."""
    walls = tuple(wall_seconds(run.traces) for run in runs)
    text = [trace for run in runs for trace in run.of("text")]
    images = [trace for run in runs for trace in run.of("image")]
    image_walls = [wall_seconds(found) for run in runs if (found := run.of("image"))]
    tokens = sum(trace.tokens for run in runs for trace in run.traces)
    return Figures(
        wall_seconds=statistics.median(walls),
        wall_seconds_each=walls,
        tokens_per_second=tokens / sum(walls),
        image_requests_per_second=len(images) / sum(image_walls) if images else None,
        text=_latencies(text),
        images=_latencies(images),
        stalls=stalls(text, len(runs)) if text else None,
        covered=all(map(_covered, runs)) if text and images else None,
        client_pause_seconds=math.fsum(length for run in runs for _, length in run.client_pauses) / len(runs),
    )


def stalls(text: Iterable[Trace], repetitions: int = 1) -> Stalls:
    """Compute the stalls of the text streams of some repetitions."""
    gaps = [gap for trace in text for gap in trace.gaps]
    long = [gap for gap in gaps if gap > STALL]
    return Stalls(math.fsum(long) / repetitions, len(long) / repetitions, max(gaps, default=0.0))


def wall_seconds(traces: Sequence[Trace]) -> float:
    """Return the seconds from the first request sent to the last token."""
    return max(trace.arrivals[-1] for trace in traces) - min(trace.sent for trace in traces)


def device_finish(run: Run, seconds_each: float) -> float:
    """Return when a device that takes `seconds_each` and is idle only while no image waits is done with a run's images.

    Counted from the first request sent.
    """
    start = min(trace.sent for trace in run.traces)
    finish = 0.0
    for sent in sorted(trace.sent for trace in run.of("image")):
        finish = max(finish, sent - start) + seconds_each
    return finish


def bound(runs: Sequence[Run], seconds_each: float | None, decode_seconds: float | None) -> Bound | None:
    """Return a load's bound, with the median of its repetitions' device times; None if a time is unknown."""
    if seconds_each is None or decode_seconds is None:
        return None
    device = statistics.median(device_finish(run, seconds_each) for run in runs)
    return Bound(device, decode_seconds, max(device, decode_seconds))


def overlap(sequential: float, concurrent: float, ideal: Bound | None) -> Overlap:
    """Return the gain of concurrent image requests from wall seconds; `ideal` is the bound of the concurrent ones."""
    best = ideal.seconds if ideal is not None else 0.0
    return Overlap(sequential, concurrent, sequential / concurrent, sequential / best if best else None)


def _latencies(traces: Sequence[Trace]) -> Latencies | None:
    if not traces:
        return None
    gaps = Spread.of(gap for trace in traces for gap in trace.gaps)
    return Latencies(Spread.of(trace.ttft for trace in traces), gaps)


def _covered(run: Run) -> bool:
    last_token = max(trace.arrivals[-1] for trace in run.of("text"))
    return last_token >= max(trace.arrivals[0] for trace in run.of("image"))


def _wall(runs: Sequence[Run]) -> float:
    return statistics.median(wall_seconds(run.traces) for run in runs)


def _concurrency(plan: Plan, taken: Mapping[str, Taken], device: DeviceTime) -> Concurrency:
    sequential = _wall(taken[Mode.INLINE].one_by_one)
    decode = min((_wall(runs.together_free) for runs in taken.values() if runs.together_free), default=None)
    modes = {
        name: overlap(sequential, _wall(runs.together), bound(runs.together, device.seconds_each, decode))
        for name, runs in taken.items()
        if runs.together
    }
    return Concurrency(plan.images, modes)


def _notes(
    taken: Mapping[str, Taken], modes: Mapping[str, ModeReport], simulated: bool | None, device: DeviceTime
) -> Iterator[str]:
    if simulated:
        yield (
            "The device is SIMULATED: no hardware encodes, a call takes the configured time. Stock vLLM's encoder "
            "does not take that time."
        )
    elif simulated is None:
        yield "Whether the devices of running servers are simulated is unknown."
    if device.seconds_each is None:
        yield "The bound is unknown, because the device's time is. Pass --device-seconds."
    for name, mode in modes.items():
        if taken[name].overran:
            yield f"{name}: the simulated device computed for longer than its latency; pass a longer one."
        if mode.times_bound is not None and mode.times_bound < 1:
            yield (
                f"{name}: faster than the bound, so the machine was busier while decode was measured; pass more "
                "--repeats."
            )
        if mode.mixed.client_pause_seconds > 0:
            yield (
                f"{name}: the client itself did not run for {mode.mixed.client_pause_seconds:.2f} s, because the "
                "machine was busy: the server may be faster and stall less than these figures show."
            )
        if mode.mixed.covered is False:
            yield (
                f"{name}: the text streams ended before the last image's first token, so some stalls could not show; "
                "pass more --stream-tokens."
            )
