"""What `bench serve` measured, as tables and bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from visionaccel_bench.reporting.charts import Bar, draw_bars
from visionaccel_bench.reporting.markup import Content, Html, element, joined, paragraph, table
from visionaccel_bench.serve.figures import STALL, Latencies, Spread, Stalls
from visionaccel_bench.serve.serve_report import Concurrency, ModeReport, Report

__all__ = ["servers"]

_DASH = "-"


def servers(report: Report) -> Html:
    """One column for each server, and below it whether requests with images gain from being sent at once."""
    plan = report.plan
    device = "unknown device" if report.backend is None else f"backend {report.backend}"
    about = " (SIMULATED device)" if report.simulated else ""
    load = (
        f"text streams: {plan.streams} of {plan.stream_tokens} tokens; images: {plan.images} of "
        f"{plan.size[0]}x{plan.size[1]}, {f'{plan.gap:g} s apart' if plan.gap else 'at once'}; {device}{about}"
    )
    modes = report.modes
    walls = [
        Bar(
            name,
            mode.mixed.wall_seconds,
            f"{mode.mixed.wall_seconds:.2f} s"
            + ("" if mode.times_bound is None else f", {mode.times_bound:.2f} times"),
            mark=None if mode.bound is None else mode.bound.seconds,
            second=name == "stock",
        )
        for name, mode in modes.items()
    ]
    stalls = [
        Bar(name, mode.mixed.stalls.seconds, f"{mode.mixed.stalls.seconds:.2f} s", second=name == "stock")
        for name, mode in modes.items()
        if mode.mixed.stalls is not None
    ]
    rows = [(name, *map(show, modes.values())) for name, show in _ROWS.items()]
    each = report.device.seconds_each
    notes = [f"Device: {'unknown' if each is None else f'{each:.3f} s an image'} ({report.device.how})."]
    if report.decode_how is not None:
        notes.append(f"Decode: {report.decode_how}; the bound has the least of all modes.")
    parts = [
        paragraph(load, class_="faint"),
        draw_bars(walls, "wall seconds of text and images together, less is better", "what an ideal server needs"),
    ]
    if stalls:
        parts.append(
            draw_bars(stalls, f"seconds of stalls over {1e3 * STALL:.0f} ms in the text streams, less is better")
        )
    parts.append(table(("", *modes), rows, numbers=True))
    if report.concurrency is not None:
        parts += _concurrency(report.concurrency)
    return joined([*parts, *(paragraph(note, class_="faint") for note in (*notes, *report.notes))])


def _concurrency(found: Concurrency) -> Sequence[Html]:
    rows: list[Sequence[Content]] = [
        (name, *(map(_number, (gain.sequential_seconds, gain.concurrent_seconds, gain.ratio, gain.bound))))
        for name, gain in found.modes.items()
    ]
    prior = f"prior art, {found.prior_art_requests} requests, other model and device"
    rows.append((prior, "", "", _number(found.prior_art_ratio), ""))
    title = f"{found.requests} image requests without text: one after the other in-line, and at once"
    columns = ("", "one by one, s", "at once, s", "times as fast", "an ideal server")
    return element("h4", title), table(columns, rows, numbers=True)


def _number(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f}"


def _spread(found: Spread | None, factor: float = 1.0) -> str:
    if found is None:
        return _DASH
    return " / ".join(_short(factor * value) for value in (found.p50, found.p90, found.p99))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ttft(found: Latencies | None) -> str:
    return _spread(found.ttft_seconds if found else None)


def _itl(found: Latencies | None) -> str:
    return _spread(found.itl_seconds if found else None, 1e3)


def _stalled(found: Stalls | None) -> str:
    return (
        _DASH if found is None else f"{found.seconds:.2f} ({found.number:g}, longest gap {found.longest_seconds:.2f})"
    )


_ROWS: dict[str, Callable[[ModeReport], str]] = {
    "wall, s": lambda mode: _number(mode.mixed.wall_seconds),
    "tokens/s": lambda mode: f"{mode.mixed.tokens_per_second:.1f}",
    "image requests/s": lambda mode: _number(mode.mixed.image_requests_per_second),
    "image TTFT, s: p50 / p90 / p99": lambda mode: _ttft(mode.mixed.images),
    "text TTFT, s: p50 / p90 / p99": lambda mode: _ttft(mode.mixed.text),
    "text ITL, ms: p50 / p90 / p99": lambda mode: _itl(mode.mixed.text),
    "text stalls, s": lambda mode: _stalled(mode.mixed.stalls),
    "the same without images, s": lambda mode: _stalled(mode.text_only.stalls),
    "text alone: tokens/s": lambda mode: f"{mode.text_only.tokens_per_second:.1f}",
    "client's own pauses, s": lambda mode: _number(mode.mixed.client_pause_seconds),
    "device, s": lambda mode: _number(mode.bound.device_seconds if mode.bound else None),
    "decode, s": lambda mode: _number(mode.decode_seconds),
    "ideal bound, s": lambda mode: _number(mode.bound.seconds if mode.bound else None),
    "times the ideal bound": lambda mode: _number(mode.times_bound),
}
