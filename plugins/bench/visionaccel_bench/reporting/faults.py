"""A fault suite: each fault, what was asked for after it, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from visionaccel_bench.reporting.documents import checked, read_document
from visionaccel_bench.reporting.markup import chip, table
from visionaccel_bench.reporting.page import Section

__all__ = ["FaultRow", "FaultSuite", "faults_section", "read_faults"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class FaultRow(_Model):
    """One fault in one way of encoding.

    Attributes:
        fault: What went wrong, on purpose.
        moment: When.
        mode: How images were encoded.
        isolation: Whether the device had a process of its own.
        fallback: Whether another backend could take over; None if that is not told.
        expected: What should be answered.
        answered: What was.
        lost: Requests without an answer.
        wrong: Answers that were not right.
        recovery_seconds: Until the next image was encoded; None if that was not measured.
        passed: Whether it went as it should.
        detail: What else was seen.
    """

    fault: str
    moment: str
    mode: Literal["inline", "pipelined"]
    isolation: Literal["none", "process"]
    fallback: bool | None = None
    expected: str | int | float | bool | None
    answered: str | int | float | bool | None
    lost: int = Field(ge=0)
    wrong: int = Field(0, ge=0)
    recovery_seconds: float | None = Field(ge=0)
    passed: bool
    detail: str | None = None


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


def read_faults(path: Path) -> FaultSuite:
    """Read what a fault suite wrote.

    Raises:
        ConfigurationError: If the file cannot be read.
        InputError: If it is none.
    """
    return checked(FaultSuite, read_document(path), path, "what a fault suite writes")


def faults_section(suite: FaultSuite) -> Section:
    """The faults that did not go as they should first, then the others in their order."""
    rows: Sequence[FaultRow] = sorted(suite.rows, key=lambda row: row.passed)
    passed, lost, wrong = (sum(getattr(row, name) for row in rows) for name in ("passed", "lost", "wrong"))
    times = [row.recovery_seconds for row in rows if row.recovery_seconds is not None]
    recovery = f"; recovery took at most {max(times):.2f} s" if times else ""
    device = ", in a SIMULATED device" if suite.simulated else ""
    summary = (
        f"{passed} of {len(rows)} faults went as they should on {suite.created}{device}; {lost} requests lost, {wrong} "
        f"answers wrong{recovery}."
    )
    columns = (
        "", "fault", "moment", "mode", "isolation", "fallback", "expected", "answered", "lost", "wrong", "recovery, s",
        "detail",
    )  # fmt: skip
    body = table(
        columns,
        [
            (
                chip("pass" if row.passed else "failure"), row.fault, row.moment, row.mode, row.isolation,
                {True: "yes", False: "none", None: "-"}[row.fallback], _said(row.expected), _said(row.answered),
                row.lost, row.wrong,
                "-" if row.recovery_seconds is None else f"{row.recovery_seconds:.2f}", row.detail,
            )
            for row in rows
        ],
    )  # fmt: skip
    return Section("faults", "Faults", "pass" if passed == len(rows) else "failure", summary, body)


def _said(value: str | float | None) -> str:
    return "-" if value is None else str(value)
