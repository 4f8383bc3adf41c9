"""The cells of the fault suite: which fault, when, in which kind of server; and the document of their outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import Field

from visionaccel_bench.blocks import DASH, Table

Fault: TypeAlias = Literal["raise", "nan", "zeros", "drift", "hang", "exit", "abort"]
"""What the simulated device does, by the names of the option `faults` of the backend `simulated`."""

Moment: TypeAlias = Literal["alone", "beside", "repeated", "restart", "unopened", "both"]
"""When the fault strikes: one request; one of several while a text stream is decoded; every encode until the breaker
opens; one request, after which the process that replaces the dead one gives wrong answers; one request, while the
fallback fails to open once; or one request, while the fallback in the server's process hangs."""

Mode: TypeAlias = Literal["inline", "pipelined"]
Isolation: TypeAlias = Literal["none", "process"]

Change: TypeAlias = Literal["replaced", "rewritten"]
"""How a checkpoint's files change: new files are renamed to their names, or new bytes are written into them."""

FAULTS: tuple[Fault, ...] = get_args(Fault)
MOMENTS: tuple[Moment, ...] = get_args(Moment)
_DEADLY: frozenset[Fault] = frozenset({"exit", "abort"})


@dataclass(frozen=True, slots=True)
class Serving:
    """A kind of server.

    Attributes:
        mode: Where it encodes.
        isolation: Where the device runs.
        fallback: Whether another backend takes over.
        faulty: Whether the first of two fallbacks is simulated too, in the server's process.
    """

    mode: Mode
    isolation: Isolation
    fallback: bool
    faulty: bool = False

    @property
    def change(self) -> Change:
        """How the served checkpoint's weights change once the server is up; each mode has servers of both."""
        return "replaced" if self.isolation == "process" else "rewritten"

    def __str__(self) -> str:
        where = "a separate process" if self.isolation == "process" else "the server's process"
        behind = "with a faulty fallback" if self.faulty else f"{'with' if self.fallback else 'without'} a fallback"
        return f"{self.mode}, device in {where}, {behind}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One planted fault."""

    serving: Serving
    fault: Fault
    moment: Moment

    @property
    def expected(self) -> str:
        """How the affected request must end: with an answer, or, without a fallback, with an error."""
        return "answer" if self.serving.fallback else "error"

    def __str__(self) -> str:
        return f"{self.fault}, {self.moment}: {self.serving}"


def every_cell() -> list[Cell]:
    """Return the cells of all kinds of server; those of one kind follow each other."""
    with_fallback = [Serving(mode, isolation, True) for mode in get_args(Mode) for isolation in get_args(Isolation)]
    without = (
        Serving("inline", "none", False),
        Serving("pipelined", "none", False),
        Serving("pipelined", "process", False),
    )
    faulty = (Serving(mode, "process", True, faulty=True) for mode in get_args(Mode))
    return [cell for serving in (*with_fallback, *without, *faulty) for cell in _cells_of(serving)]


def _cells_of(serving: Serving) -> Iterator[Cell]:
    """Return the cells of a kind of server.

    A fault that ends a process needs a device in a separate process. Wrong values that look plausible are detected by
    the canary, not by the request, and without a fallback every request fails from then on, which `repeated` tests.
    """
    if serving.faulty:
        yield Cell(serving, "raise", "unopened")  # first: the fallback is opened once
        yield Cell(serving, "exit", "both")
        return
    for fault in FAULTS:
        if fault in _DEADLY and serving.isolation == "none":
            continue
        for moment in ("alone", "beside", "repeated"):
            if serving.fallback or (moment != "beside" and (fault == "drift") == (moment == "repeated")):
                yield Cell(serving, fault, moment)
    if serving.isolation == "process" and serving.fallback:
        for fault in sorted(_DEADLY):
            yield Cell(serving, fault, "restart")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRow:
    """The outcome of one fault in one kind of server.

    Attributes:
        fallback: Whether another backend could take over; None if unknown.
        expected: How the affected requests should be answered.
        answered: How they were answered: `right answer`, `error`, or a description.
        lost: Requests that got neither an answer nor an error that says why.
        wrong: Answers to any request whose token ids differ from stock vLLM's.
        recovery_seconds: From the time the fault was lifted to the first correct answer by the device; None if there
            was none.
        passed: Whether every check passed.
        detail: The checks that did not.
    """

    fault: str
    moment: str
    mode: Mode
    isolation: Isolation
    fallback: bool | None = None
    expected: str
    answered: str
    lost: Annotated[int, Field(ge=0)]
    wrong: Annotated[int, Field(ge=0)] = 0
    recovery_seconds: Annotated[float, Field(ge=0)] | None
    passed: bool
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSuite:
    """The outcomes of all faults, at least one. `created` is a time in ISO 8601."""

    created: str
    simulated: bool = False
    rows: Annotated[tuple[FaultRow, ...], Field(min_length=1, max_length=5000)]


_COLUMNS: dict[str, Callable[[FaultRow], str]] = {
    "passed": lambda row: "pass" if row.passed else "failure",
    "fault": lambda row: row.fault,
    "moment": lambda row: row.moment,
    "mode": lambda row: row.mode,
    "isolation": lambda row: row.isolation,
    "fallback": lambda row: {True: "yes", False: "none", None: DASH}[row.fallback],
    "expected": lambda row: row.expected,
    "answered": lambda row: row.answered,
    "lost": lambda row: str(row.lost),
    "wrong": lambda row: str(row.wrong),
    "back after, s": lambda row: DASH if row.recovery_seconds is None else f"{row.recovery_seconds:.2f}",
    "detail": lambda row: row.detail,
}


def fault_table(rows: Iterable[FaultRow], *, without: Iterable[str] = (), title: str = "") -> Table:
    """Make a table of the rows without some columns."""
    columns = tuple(name for name in _COLUMNS if name not in without)
    return Table(columns, tuple(tuple(_COLUMNS[name](row) for name in columns) for row in rows), title, "statuses")
