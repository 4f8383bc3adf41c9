"""The document that a fault suite writes, and its table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from visionaccel_bench.tables import DASH, Table


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class FaultRow(_Model):
    """One fault in one kind of server.

    Attributes:
        fault: What the device did.
        moment: When.
        mode: How images were encoded.
        isolation: Whether the device had its own process.
        fallback: Whether another backend could take over; None if unknown.
        expected: What the requests that it struck should be answered.
        answered: What they were answered.
        lost: Requests without an answer.
        wrong: Wrong answers.
        recovery_seconds: Until the device answered again; None if it did not.
        passed: Whether it went as it should.
        detail: What did not.
    """

    fault: str
    moment: str
    mode: Literal["inline", "pipelined"]
    isolation: Literal["none", "process"]
    fallback: bool | None = None
    expected: str
    answered: str
    lost: int = Field(ge=0)
    wrong: int = Field(0, ge=0)
    recovery_seconds: float | None = Field(ge=0)
    passed: bool
    detail: str = ""


class FaultSuite(_Model):
    """All faults.

    Attributes:
        created: Time in ISO 8601.
        simulated: Whether the device was simulated.
        rows: At least one.
    """

    created: str
    simulated: bool = False
    rows: tuple[FaultRow, ...] = Field(min_length=1, max_length=5000)


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
    "recovery, s": lambda row: DASH if row.recovery_seconds is None else f"{row.recovery_seconds:.2f}",
    "detail": lambda row: row.detail,
}


def fault_table(rows: Iterable[FaultRow], *, without: Iterable[str] = (), title: str = "") -> Table:
    """The rows as a table.

    Args:
        rows: In the order of the table.
        without: Columns to leave out.
        title: What stands above it.
    """
    columns = tuple(name for name in _COLUMNS if name not in without)
    return Table(columns, tuple(tuple(_COLUMNS[name](row) for name in columns) for row in rows), title, "statuses")
