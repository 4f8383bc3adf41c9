"""A trace: what was done when, lane by lane, and how much of it at the same time.

The format is Chrome's: a JSON array of events, one a line. Its closing bracket may be missing, and its last line may be
torn, as where the process that wrote it was ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionaccel.core.safe_text import one_line
from visionaccel.errors import InputError
from visionaccel_bench.reporting.documents import parsed, read_text
from visionaccel_bench.reporting.intervals import Interval, difference, intersection, length, union

__all__ = ["CATEGORIES", "Event", "Lane", "Overlap", "Trace", "overlap", "read_trace"]

CATEGORIES = ("queue", "device", "host", "decode", "processor")
OTHER = "other"

_MOST_BYTES = 32 * 2**20
_MOST_EVENTS = 300_000
_MOST_MICROSECONDS = 1e18
_MOST_ARGUMENTS = 160


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time.

    Attributes:
        name: What it was.
        category: One of `CATEGORIES`, or `other`.
        start: In microseconds.
        duration: In microseconds.
        about: What else is known of it, as text.
    """

    name: str
    category: str
    start: float
    duration: float
    about: str = ""

    @property
    def end(self) -> float:
        """In microseconds."""
        return self.start + self.duration


@dataclass(frozen=True, slots=True)
class Lane:
    """The events of one thread.

    Attributes:
        name: Of its process and thread.
        events: Ordered by their start, the longer first.
    """

    name: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace with at least one event.

    Attributes:
        lanes: In the order of their first event.
    """

    lanes: tuple[Lane, ...]

    @property
    def events(self) -> list[Event]:
        """Those of all lanes."""
        return [event for lane in self.lanes for event in lane.events]


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much of a device's time decode steps ran too. Times are in seconds.

    Attributes:
        device: In which a device computed.
        decode: In which a decode step ran.
        both: In which both did.
    """

    device: float
    decode: float
    both: float

    @property
    def share(self) -> float | None:
        """Of the device's time, that in which decode steps ran; None without a device's time."""
        return self.both / self.device if self.device else None


def overlap(lanes: Iterable[Lane]) -> Overlap:
    """The overlap of device and decode; several at once of either count once.

    A device's event may hold the parts that the host does of it, in the same lane: those are not the device's time.
    """
    device: list[Interval] = []
    decode: list[Interval] = []
    for lane in lanes:
        device += difference(_times(lane, "device"), _times(lane, "host"))
        decode += _times(lane, "decode")
    busy, steps = union(device), union(decode)
    return Overlap(*(length(each) / 1e6 for each in (busy, steps, intersection(busy, steps))))


def _times(lane: Lane, category: str) -> list[Interval]:
    return union((event.start, event.end) for event in lane.events if event.category == category)


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        ConfigurationError: If the file cannot be read.
        InputError: If it is larger than a page is made of, no trace, or has no event that took time.
    """
    named: dict[tuple[str, str, str], str] = {}
    lanes: dict[tuple[str, str], list[Event]] = {}
    for index, entry in enumerate(_entries(path)):
        try:
            if not isinstance(entry, Mapping):
                raise ValueError("it is no JSON object")
            key = _key(entry, "pid"), _key(entry, "tid")
            if entry.get("ph") == "M":
                _take_name(named, key, entry)
            elif entry.get("ph") == "X":
                lanes.setdefault(key, []).append(_event(entry))
        except ValueError as error:
            raise InputError(
                f"{path} is no trace: event {index}: {error}.", hint="Name a trace that visionaccel wrote."
            ) from error
    if not lanes:
        raise InputError(f"{path} holds no event that took time.", hint="Record a trace while images are encoded.")
    return Trace(
        tuple(
            # What holds others comes before them.
            Lane(_lane_name(key, named), tuple(sorted(events, key=lambda event: (event.start, -event.duration))))
            for key, events in lanes.items()
        )
    )


def _entries(path: Path) -> list[Any]:
    text = read_text(path, _MOST_BYTES).strip()
    whole = text.removesuffix("]").rstrip().removesuffix(",")
    torn = whole.rpartition("\n")[0].rstrip().removesuffix(",")
    problem: Exception | None = None
    for attempt in (text, f"{whole}]", f"{torn}]"):
        try:
            found = parsed(attempt)
            break
        except (ValueError, RecursionError) as error:
            problem = problem or error
    else:
        raise InputError(
            f"{path} is no trace: {one_line(str(problem))}", hint="Name a trace that visionaccel wrote."
        ) from problem
    if not isinstance(found, list):
        raise InputError(f"{path} is no trace: it is no JSON array.", hint="Name a trace that visionaccel wrote.")
    if len(found) > _MOST_EVENTS:
        raise InputError(f"{path} has {len(found)} events; a page shows {_MOST_EVENTS}.", hint="Record for less long.")
    return found


def _key(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"its {name} is no number and no text")
    return str(value)


def _take_name(named: dict[tuple[str, str, str], str], key: tuple[str, str], entry: Mapping[str, Any]) -> None:
    arguments = entry.get("args")
    if entry.get("name") in ("process_name", "thread_name") and isinstance(arguments, Mapping):
        named[(str(entry["name"]), *key)] = str(arguments.get("name", ""))
        if entry["name"] == "process_name":
            named.setdefault(("process_name", key[0], ""), str(arguments.get("name", "")))


def _event(entry: Mapping[str, Any]) -> Event:
    name, category = entry.get("name"), entry.get("cat")
    if not isinstance(name, str) or not isinstance(category, str):
        raise ValueError("its name or cat is no text")
    arguments = entry.get("args")
    about = ""
    if isinstance(arguments, Mapping):
        about = ", ".join(f"{key}={value}" for key, value in list(arguments.items())[:8])[:_MOST_ARGUMENTS]
    return Event(name, category if category in CATEGORIES else OTHER, _time(entry, "ts"), _time(entry, "dur"), about)


def _time(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"its {name} is no number")
    if abs(value) > _MOST_MICROSECONDS or (name == "dur" and value < 0):
        raise ValueError(f"its {name} is no time")
    return float(value)


def _lane_name(key: tuple[str, str], named: Mapping[tuple[str, str, str], str]) -> str:
    process = named.get(("process_name", *key)) or named.get(("process_name", key[0], "")) or f"process {key[0]}"
    thread = named.get(("thread_name", *key)) or f"thread {key[1]}"
    return f"{process}: {thread}"
