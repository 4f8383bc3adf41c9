"""What a report is made of: files of benchmarks, fault suites and traces. They may be untrusted.

Each file is read as a whole or refused. A trace, in Chrome's format, is a JSON array of events, one a line. Its closing
bracket may be missing and its last line may be incomplete, because the process that wrote it was killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from visionaccel.core.bounded_files import MOST_JSON_BYTES, parse_json, read_bounded
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.safe_text import one_line
from visionaccel.errors import ConfigurationError, InputError
from visionaccel_bench.encode.encode_report import EncodeReport
from visionaccel_bench.encode.placement import PlacementReport
from visionaccel_bench.faultsuite.cells import FaultSuite
from visionaccel_bench.serve.serve_report import Report as ServeReport

Benchmark: TypeAlias = EncodeReport | PlacementReport | ServeReport

CATEGORIES = ("queue", "device", "host", "decode", "processor")
OTHER = "other"

_BENCHMARKS: tuple[tuple[frozenset[str], type[Benchmark], str], ...] = (
    (frozenset({"contenders", "grids"}), EncodeReport, "what `bench encode` writes"),
    (frozenset({"placements", "measured"}), PlacementReport, "what `bench placement` writes"),
    (frozenset({"modes", "plan"}), ServeReport, "what `bench serve` writes"),
)
"""The keys of each benchmark's document, its type, and its name in errors."""

_MOST_DIGITS = 18
_MOST_TRACE_BYTES = 32 * 2**20
_MOST_EVENTS = 300_000
_MOST_MICROSECONDS = 1e18
_HINT = "Pass a file that visionaccel wrote."

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """Work that took time: one of `CATEGORIES` or `other`, its start and duration in microseconds."""

    category: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        """In microseconds."""
        return self.start + self.duration


@dataclass(frozen=True, slots=True)
class Lane:
    """The events of one thread, sorted by start; `name` holds its process and thread."""

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


@dataclass(frozen=True, slots=True)
class Inputs:
    """A bundle or checkpoint, benchmarks and traces with the names of their files, and a fault suite."""

    source: str | None
    benchmarks: tuple[tuple[str, Benchmark], ...]
    traces: tuple[tuple[str, Trace], ...]
    faults: FaultSuite | None


def read_inputs(
    source: str | None = None, benchmarks: Sequence[Path] = (), traces: Sequence[Path] = (), faults: Path | None = None
) -> Inputs:
    """Read every file.

    Raises:
        ConfigurationError: A file cannot be read.
        InputError: A file has the wrong contents or is too large.
    """
    return Inputs(
        source,
        tuple((path.name, read_benchmark(path)) for path in benchmarks),
        tuple((path.name, read_trace(path)) for path in traces),
        None if faults is None else read_faults(faults),
    )


def read_benchmark(path: Path) -> Benchmark:
    """Read what a benchmark wrote with `--output` or `--json`. Raises the errors of `read_inputs`."""
    document = read_document(path)
    for keys, kind, what in _BENCHMARKS:
        if isinstance(document, dict) and keys <= document.keys():
            return _checked(kind, document, path, what)
    raise InputError(
        f"{path} is not a benchmark result.",
        hint="Pass a JSON file that `visionaccel bench` wrote.",
    )


def read_faults(path: Path) -> FaultSuite:
    """Read what `visionaccel faults --output` wrote. Raises the errors of `read_inputs`."""
    return _checked(FaultSuite, read_document(path), path, "what a fault suite writes")


def read_document(path: Path) -> Any:
    """Read a JSON document. Raises the errors of `read_inputs`."""
    text = _read_text(path, MOST_JSON_BYTES)
    try:
        return parse_json(text, most_digits=_MOST_DIGITS)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {one_line(str(error))}", hint=_HINT) from error


def read_trace(path: Path) -> Trace:
    """Read a trace, which must have an event that took time. Raises the errors of `read_inputs`."""
    text = _read_text(path, _MOST_TRACE_BYTES)
    try:
        entries = _entries(text)
        lanes = _lanes(entries[:_MOST_EVENTS])
    except ValueError as error:
        raise InputError(f"{path} is not a trace: {one_line(str(error))}", hint=_HINT) from error
    if len(entries) > _MOST_EVENTS:
        raise InputError(
            f"{path} has {len(entries)} events; the maximum is {_MOST_EVENTS}.", hint="Record for a shorter time."
        )
    if not lanes:
        raise InputError(f"{path} contains no events that took time.", hint="Record a trace while images are encoded.")
    return Trace(tuple(lanes))


def overlap(lanes: Iterable[Lane]) -> Overlap:
    """Measure the overlap of device and decode; several of either at the same time count once.

    A device's event may contain events of the host's part, in the same lane: those are not the device's time.
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
    """An event in a trace's file."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    name: str
    cat: str
    ts: Annotated[float, Field(ge=-_MOST_MICROSECONDS, le=_MOST_MICROSECONDS)]
    dur: Annotated[float, Field(ge=0, le=_MOST_MICROSECONDS)]
    pid: int | str = 0
    tid: int | str = 0


def _entries(text: str) -> list[Any]:
    """Parse the events of a trace; ValueError if it is not an array."""
    text = text.strip()
    whole = text.removesuffix("]").rstrip().removesuffix(",")
    without_last_line = whole.rpartition("\n")[0].rstrip().removesuffix(",")
    problems: list[ValueError] = []
    for attempt in (text, f"{whole}]", f"{without_last_line}]"):
        try:
            found = parse_json(attempt, most_digits=_MOST_DIGITS)
        except ValueError as error:
            problems.append(error)
        else:
            if not isinstance(found, list):
                raise ValueError("it is not a JSON array.")
            return found
    raise problems[0]


def _lanes(entries: Iterable[Any]) -> list[Lane]:
    """Sort events into lanes by process and thread; ValueError if an event is malformed."""
    processes: dict[str, str] = {}
    threads: dict[tuple[str, str], str] = {}
    lanes: dict[tuple[str, str], list[Event]] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"event {index} is not a JSON object.")
        if entry.get("ph") == "X":
            try:
                read = _Slice.model_validate(entry)
            except ValidationError as error:
                raise ValueError(f"event {index}: {problems_of(error)}.") from error
            category = read.cat if read.cat in CATEGORIES else OTHER
            lanes.setdefault((str(read.pid), str(read.tid)), []).append(Event(category, read.ts, read.dur))
        elif entry.get("ph") == "M" and isinstance(arguments := entry.get("args"), Mapping):
            process, thread, name = str(entry.get("pid", 0)), str(entry.get("tid", 0)), str(arguments.get("name", ""))
            if entry.get("name") == "process_name":
                processes[process] = name
            elif entry.get("name") == "thread_name":
                threads[process, thread] = name
    return [
        Lane(
            f"{processes.get(process) or f'process {process}'}: {threads.get((process, thread)) or f'thread {thread}'}",
            tuple(sorted(events, key=lambda event: event.start)),
        )
        for (process, thread), events in lanes.items()
    ]


def _read_text(path: Path, most_bytes: int) -> str:
    try:
        return read_bounded(path, most_bytes).decode("utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error}", hint="Pass a file that exists.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}", hint="Pass a JSON file.") from error
    except ValueError as error:
        raise InputError(
            f"{path} cannot be displayed: {error}.", hint="Pass a JSON file; if it is too large, record a shorter run."
        ) from error


def _checked(kind: type[T], document: Any, path: Path, what: str) -> T:
    """Make a dataclass or model from its JSON document; InputError if the document is not `what`."""
    try:
        return TypeAdapter(kind).validate_python(document)
    except (ValidationError, RecursionError, ArithmeticError) as error:
        raise InputError(
            f"{path} is not {what}: {one_line(problems_of(error))}.", hint="Pass a file that this visionaccel wrote."
        ) from error
