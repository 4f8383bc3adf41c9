"""A serving benchmark as tables, for the terminal and the report's page."""

from __future__ import annotations

from collections.abc import Callable

from visionaccel.cli.output import number
from visionaccel_bench.serve.figures import STALL, Latencies, Stalls
from visionaccel_bench.serve.serve_report import Concurrency, ModeReport, Report
from visionaccel_bench.tables import DASH, Table


def load_of(report: Report) -> str:
    """What was sent, and what encoded."""
    plan = report.plan
    device = "unknown device" if report.backend is None else f"backend {report.backend}"
    about = " (SIMULATED device)" if report.simulated else ""
    spaced = f"{plan.gap:g} s apart" if plan.gap else "at once"
    return (
        f"text streams: {plan.streams} of {plan.stream_tokens} tokens; images: {plan.images} of "
        f"{plan.size[0]}x{plan.size[1]}, {spaced}; {device}{about}"
    )


def serve_table(report: Report, title: str = "") -> Table:
    """One column for each server."""
    rows = tuple((name, *map(show, report.modes.values())) for name, show in _ROWS.items())
    return Table(("", *report.modes), rows, title, "numbers")


def concurrency_table(found: Concurrency) -> Table:
    """Whether requests with images gain from being sent at once."""
    rows = [
        (name, *map(number, (gain.sequential_seconds, gain.concurrent_seconds, gain.ratio, gain.bound)))
        for name, gain in found.modes.items()
    ]
    prior = f"prior art, {found.prior_art_requests} requests, other model and device"
    rows.append((prior, "", "", number(found.prior_art_ratio), ""))
    title = f"{found.requests} image requests without text: one after the other in-line, and at once"
    return Table(("", "one by one, s", "at once, s", "times as fast", "an ideal server"), tuple(rows), title, "numbers")


def notes(report: Report) -> list[str]:
    """Where the times of device and decode come from, and what a reader must know."""
    each = report.device.seconds_each
    found = [f"Device: {'unknown' if each is None else f'{each:.3f} s an image'} ({report.device.how})."]
    if report.decode_how is not None:
        found.append(f"Decode: {report.decode_how}; the bound has the least of all modes.")
    return [*found, *report.notes]


def _ttft(found: Latencies | None) -> str:
    spread = found.ttft_seconds if found else None
    return DASH if spread is None else f"{spread.p50:.2f} {spread.p90:.2f} {spread.p99:.2f}"


def _itl(found: Latencies | None) -> str:
    spread = found.itl_seconds if found else None
    if spread is None:
        return DASH
    values = (1e3 * value for value in (spread.p50, spread.p90, spread.p99, spread.max))
    return " ".join(f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in values)


def _stalls(found: Stalls | None) -> str:
    return DASH if found is None else f"{found.seconds:.2f} ({found.number:g}, longest gap {found.longest_seconds:.2f})"


_ROWS: dict[str, Callable[[ModeReport], str]] = {
    "wall, s": lambda mode: number(mode.mixed.wall_seconds),
    "tokens/s": lambda mode: f"{mode.mixed.tokens_per_second:.1f}",
    "image requests/s": lambda mode: number(mode.mixed.image_requests_per_second),
    "image TTFT, s: p50 p90 p99": lambda mode: _ttft(mode.mixed.images),
    "image ITL, ms: p50 p90 p99 max": lambda mode: _itl(mode.mixed.images),
    "text TTFT, s: p50 p90 p99": lambda mode: _ttft(mode.mixed.text),
    "text ITL, ms: p50 p90 p99 max": lambda mode: _itl(mode.mixed.text),
    f"text stalls over {1e3 * STALL:.0f} ms, s": lambda mode: _stalls(mode.mixed.stalls),
    "the same without images, s": lambda mode: _stalls(mode.text_only.stalls),
    "text alone: tokens/s": lambda mode: f"{mode.text_only.tokens_per_second:.1f}",
    "client's own pauses, s": lambda mode: number(mode.mixed.client_pause_seconds),
    "device, s": lambda mode: number(mode.bound.device_seconds if mode.bound else None),
    "decode, s": lambda mode: number(mode.decode_seconds),
    "ideal bound, s": lambda mode: number(mode.bound.seconds if mode.bound else None),
    "times the ideal bound": lambda mode: number(mode.times_bound),
}
