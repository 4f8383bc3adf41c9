"""Traces in Chrome's format: what ran when, lane by lane, and how much of it at the same time.

A trace is a JSON array of events, one a line. Its closing bracket may be missing, and its last line may be torn, as
where the process that wrote it was ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visionaccel.core.invalid_values import problems_of
from visionaccel.core.safe_text import one_line
from visionaccel.errors import InputError
from visionaccel_bench.reporting.documents import parsed, read_text

CATEGORIES = ("queue", "device", "host", "decode", "processor")
OTHER = "other"

_MOST_BYTES = 32 * 2**20
_MOST_EVENTS = 300_000
_MOST_MICROSECONDS = 1e18
_HINT = "Name a trace that visionaccel wrote."


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time: one of `CATEGORIES` or `other`, its start and duration in microseconds."""

    category: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """In microseconds."""
        return self.start + self.duration


@dataclass(frozen=True, slots=True)
class Lane:
    """The events of one thread by their start; the name is that of its process and thread."""

    name: str
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace with at least one event; lanes are in the order of their first event in the file."""

    lanes: tuple[Lane, ...]

    @property
    def events(self) -> list[Event]:
        """The events of all lanes."""
        return [event for lane in self.lanes for event in lane.events]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Seconds in which a device computed, in which a decode step ran, and in which both did."""

    device: float
    decode: float
    both: float

    @property
    def share(self) -> float | None:
        """The share of the device's time in which decode steps ran; None if no device computed."""
        return self.both / self.device if self.device else None


def overlap(lanes: Iterable[Lane]) -> Overlap:
    """The overlap of device and decode; several at once of either count once.

    A device's event may hold the parts that the host does of it, in the same lane: those are not the device's time.
    """
    edges = sorted(
        (time, number, event.category, change)
        for number, lane in enumerate(lanes)
        for event in lane.events
        if event.category in ("device", "host", "decode")
        for time, change in ((event.start, 1), (event.end, -1))
    )
    running: Counter[tuple[int, str]] = Counter()
    computing: set[int] = set()
    decoding: set[int] = set()
    device = decode = both = 0.0
    before = edges[0][0] if edges else 0.0
    for time, lane, category, change in edges:
        passed, before = time - before, time
        device += passed if computing else 0.0
        decode += passed if decoding else 0.0
        both += passed if computing and decoding else 0.0
        running[lane, category] += change
        for lanes_of, runs in (
            (computing, running[lane, "device"] > 0 and not running[lane, "host"] > 0),
            (decoding, running[lane, "decode"] > 0),
        ):
            (lanes_of.add if runs else lanes_of.discard)(lane)
    return Overlap(device / 1e6, decode / 1e6, both / 1e6)


class _Slice(BaseModel):
    """An event as the file has it."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    name: str
    cat: str
    ts: Annotated[float, Field(ge=-_MOST_MICROSECONDS, le=_MOST_MICROSECONDS)]
    dur: Annotated[float, Field(ge=0, le=_MOST_MICROSECONDS)]
    pid: int | str = 0
    tid: int | str = 0


def read_trace(path: Path) -> Trace:
    """Read a trace, which must have an event that took time. Raises as `read_text`."""
    processes: dict[str, str] = {}
    threads: dict[tuple[str, str], str] = {}
    lanes: dict[tuple[str, str], list[Event]] = {}
    for index, entry in enumerate(_entries(path)):
        if not isinstance(entry, Mapping):
            raise InputError(f"{path} is not a trace: event {index} is not a JSON object.", hint=_HINT)
        if entry.get("ph") == "X":
            try:
                read = _Slice.model_validate(entry)
            except ValidationError as error:
                problem = one_line(problems_of(error))
                raise InputError(f"{path} is not a trace: event {index}: {problem}.", hint=_HINT) from error
            category = read.cat if read.cat in CATEGORIES else OTHER
            lanes.setdefault((str(read.pid), str(read.tid)), []).append(Event(category, read.ts, read.dur))
        elif entry.get("ph") == "M" and isinstance(arguments := entry.get("args"), Mapping):
            process, thread, name = str(entry.get("pid", 0)), str(entry.get("tid", 0)), str(arguments.get("name", ""))
            if entry.get("name") == "process_name":
                processes[process] = name
            elif entry.get("name") == "thread_name":
                threads[process, thread] = name
    if not lanes:
        raise InputError(f"{path} holds no event that took time.", hint="Record a trace while images are encoded.")

    def lane(process: str, thread: str, events: list[Event]) -> Lane:
        named = processes.get(process) or f"process {process}", threads.get((process, thread)) or f"thread {thread}"
        return Lane(": ".join(named), tuple(sorted(events, key=lambda event: event.start)))

    return Trace(tuple(lane(*key, events) for key, events in lanes.items()))


def _entries(path: Path) -> list[Any]:
    text = read_text(path, _MOST_BYTES).strip()
    whole = text.removesuffix("]").rstrip().removesuffix(",")
    torn = whole.rpartition("\n")[0].rstrip().removesuffix(",")
    problem: Exception | None = None
    for attempt in (text, f"{whole}]", f"{torn}]"):
        try:
            found = parsed(attempt)
            break
        except ValueError as error:
            problem = problem or error
    else:
        raise InputError(f"{path} is not a trace: {one_line(str(problem))}", hint=_HINT) from problem
    if not isinstance(found, list):
        raise InputError(f"{path} is not a trace: it is not a JSON array.", hint=_HINT)
    if len(found) > _MOST_EVENTS:
        raise InputError(
            f"{path} has {len(found)} events; a report takes at most {_MOST_EVENTS}.", hint="Record for less long."
        )
    return found
