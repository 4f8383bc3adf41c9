"""From time stamps of requests to figures: latencies, stalls, throughput, and the bounds they are compared with.

All times are seconds. Those of a `Trace` count from the start of its load.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self

import numpy as np

from visionaccel_bench.tables import Seconds

STALL = 0.1
"""A text stream stalls where its next token takes longer than this."""

PRIOR_ART_RATIO, PRIOR_ART_REQUESTS = 1.66, 3
"""Published: three image requests, 120.29 s one after the other and 72.42 s with encoding and decoding overlapped by a
rewritten vLLM scheduler (on a real NPU, with another model)."""

Kind = Literal["text", "image"]


@dataclass(frozen=True, slots=True)
class Trace:
    """One request, as its client saw it: when it was sent, and when tokens arrived.

    One event of the server is one arrival, even if it brings several tokens; the server counts `tokens`.
    """

    name: str
    kind: Kind
    sent: float
    arrivals: tuple[float, ...]
    tokens: int

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: from each arrival to the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Run:
    """The requests of one load, sent once: at least one, each with an arrival.

    `client_pauses` are start and length of times over `STALL` in which the client itself did not run, because the
    machine was too busy: what arrived then got its time stamp late, and looks like a stall of the server.
    """

    traces: tuple[Trace, ...]
    client_pauses: tuple[tuple[float, float], ...] = ()

    def of(self, kind: Kind) -> list[Trace]:
        """The requests of one kind."""
        return [trace for trace in self.traces if trace.kind == kind]


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of some times."""

    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, times: Iterable[float]) -> Self | None:
        """The percentiles; None of no times."""
        found = list(times)
        return cls(*map(float, np.percentile(found, (50, 90, 99, 100)))) if found else None


@dataclass(frozen=True, slots=True)
class Latencies:
    """Time to first token and inter-token latency of the requests of one kind; None where there are none."""

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
    """The figures of all repetitions of one load. What there are no requests for is None.

    Attributes:
        wall_seconds: From the first request sent to the last token; the median of the repetitions.
        tokens_per_second: Tokens of all requests by the wall seconds of all repetitions.
        image_requests_per_second: Image requests by the seconds from the first one sent to the last one's last token.
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

    It is the greater of the time at which the device is done at the earliest, see `device_finish`, and of the load's
    wall where images cost the device nothing. That the last image is answered after the device is done is not added.
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


def figures(runs: Sequence[Run]) -> Figures:
    """Figures of the repetitions of one load, of which there is at least one."""
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
        covered=all(_covered(run) for run in runs) if text and images else None,
        client_pause_seconds=math.fsum(length for run in runs for _, length in run.client_pauses) / len(runs),
    )


def stalls(text: Iterable[Trace], repetitions: int = 1) -> Stalls:
    """The stalls of the text streams of some repetitions."""
    gaps = [gap for trace in text for gap in trace.gaps]
    long = [gap for gap in gaps if gap > STALL]
    return Stalls(math.fsum(long) / repetitions, len(long) / repetitions, max(gaps, default=0.0))


def wall_seconds(traces: Sequence[Trace]) -> float:
    """From the first request sent to the last token."""
    return max(trace.arrivals[-1] for trace in traces) - min(trace.sent for trace in traces)


def device_finish(run: Run, seconds_each: float) -> float:
    """When a device that takes `seconds_each` and is idle only while no image waits is done with a run's images.

    Counted from the first request sent.
    """
    start = min(trace.sent for trace in run.traces)
    finish = 0.0
    for sent in sorted(trace.sent for trace in run.of("image")):
        finish = max(finish, sent - start) + seconds_each
    return finish


def bound(runs: Sequence[Run], seconds_each: float, decode_seconds: float) -> Bound:
    """The bound of a load, with the median of its repetitions' device times."""
    device = statistics.median(device_finish(run, seconds_each) for run in runs)
    return Bound(device, decode_seconds, max(device, decode_seconds))


def overlap(sequential: float, concurrent: float, ideal: Bound | None) -> Overlap:
    """The gain of concurrent image requests by their wall seconds, and its bound by that of the concurrent ones."""
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
