"""A picture of an encode benchmark: seconds against patches, and full attention's share of the operations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel_bench.drawing import new_figure, save_png
from visionaccel_bench.encode.encode_report import ContenderReport, EncodeReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = "osD^vP*X<>"


def plot_latency(report: EncodeReport, path: Path) -> None:
    """Write a PNG: a line for each contender with a median on some grid, its spread as bars, both axes logarithmic.

    Args:
        report: What was found.
        path: The file.

    Raises:
        ConfigurationError: If the file cannot be written.
    """
    with new_figure(9.0, 7.0) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        for number, each in enumerate(report.contenders):
            _draw_contender(upper, report, each, number)
        upper.set(xscale="log", yscale="log", ylabel="seconds of an encode (median, least to most)")
        upper.set_xscale("log", base=2)
        upper.grid(visible=True, which="major", alpha=0.3)
        if upper.lines:
            upper.legend(fontsize="small", frameon=False)
        shares = sorted((grid.patches, 100 * grid.full_attention_share) for grid in report.grids)
        lower.plot(*zip(*shares, strict=True), color="grey", marker="o", linewidth=1.2)
        lower.set(xlabel="patches", ylabel="full attention,\n% of operations")
        lower.set_ylim(bottom=0)
        ticks = sorted({grid.patches for grid in report.grids})
        lower.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
        lower.minorticks_off()
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
        title = f"{report.source}, {report.plan.threads} threads, {report.machine.processor}"
        figure.suptitle(title, fontsize="medium")
        save_png(figure, path)


def _draw_contender(axes: Axes, report: EncodeReport, each: ContenderReport, number: int) -> None:
    patches = {grid.grid: grid.patches for grid in report.grids}
    points = sorted(
        (patches[grid.grid], grid.median_seconds, grid.least_seconds, grid.most_seconds)
        for grid in each.grids
        if grid.median_seconds is not None and grid.least_seconds is not None and grid.most_seconds is not None
    )
    if points:
        x, median, least, most = zip(*points, strict=True)
        below = [middle - end for middle, end in zip(median, least, strict=True)]
        above = [end - middle for middle, end in zip(median, most, strict=True)]
        about = f"{each.label} (SIMULATED)" if each.simulated else each.label
        axes.errorbar(
            x, median, [below, above], label=about, marker=_MARKS[number % len(_MARKS)], capsize=3, linewidth=1.2,
            color=f"C{number % 10}", linestyle="-" if each.kind == "backend" else "--",
        )  # fmt: skip
