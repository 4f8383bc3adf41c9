"""Traces: their pictures, and how much of the device's time the language model decoded."""

from __future__ import annotations

from collections.abc import Sequence

from visionaccel_bench.reporting.markup import Html, element, joined, paragraph
from visionaccel_bench.reporting.page import Section
from visionaccel_bench.reporting.timeline import draw_timeline
from visionaccel_bench.reporting.trace import Overlap, Trace, overlap

__all__ = ["timelines_section"]


def timelines_section(traces: Sequence[tuple[str, Trace]]) -> Section:
    """Each trace with its picture.

    Args:
        traces: The name of each file, and what it holds.
    """
    parts: list[Html] = []
    said = []
    for name, trace in traces:
        found = overlap(trace.lanes)
        said.append(f"{name}: {_share(found)}")
        parts += [element("h3", name), draw_timeline(trace), _figures(trace, found)]
    return Section("timelines", "Timelines", "pass", "; ".join(said) + ".", joined(parts))


def _share(found: Overlap) -> str:
    if found.share is None:
        return "no device computed"
    return f"decode steps ran during {found.share:.1%} of the device's time"


def _figures(trace: Trace, found: Overlap) -> Html:
    share = "-" if found.share is None else f"{found.share:.1%}"
    shown = (
        (share, "of the device's time, decode steps ran"),
        (f"{found.device:.3f} s", "a device computed"),
        (f"{found.decode:.3f} s", "decode steps ran"),
        (f"{found.both:.3f} s", "both"),
        (len(trace.events), "events"),
    )
    figures = [element("div", element("b", value), element("span", words)) for value, words in shown]
    note = "What several threads did at once of either kind counts once; what the host did of an encode does not count."
    return joined([element("div", *figures, class_="figures"), paragraph(note, class_="faint")])
