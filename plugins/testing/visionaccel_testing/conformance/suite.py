"""All checks, as a plain function and as a class of tests for pytest."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from visionaccel.errors import ConfigurationError
from visionaccel_testing.conformance.check import Check, CheckFailedError, NotApplicableError
from visionaccel_testing.conformance.declaration import BackendUnderTest
from visionaccel_testing.conformance.determinism import DETERMINISM
from visionaccel_testing.conformance.faults import FAULTS
from visionaccel_testing.conformance.interface import INTERFACE
from visionaccel_testing.conformance.kit import Kit
from visionaccel_testing.conformance.life_cycle import LIFE_CYCLE
from visionaccel_testing.conformance.mechanisms import MECHANISMS
from visionaccel_testing.conformance.numbers import NUMBERS
from visionaccel_testing.conformance.shapes import SHAPES
from visionaccel_testing.conformance.speed import SPEED

if TYPE_CHECKING:
    import pytest

CHECKS: tuple[Check, ...] = tuple(
    check
    for level in (
        INTERFACE.found,
        SHAPES.found,
        (*NUMBERS.found, *MECHANISMS),
        DETERMINISM.found,
        LIFE_CYCLE.found,
        FAULTS.found,
        SPEED.found,
    )
    for check in level
)
"""Every check, ordered by level."""

PROPERTY = "visionaccel-conformance"
"""The property of a pytest report with the backend's label, its declaration and the outcome, as JSON."""

Status: TypeAlias = Literal["passed", "failed", "known failure", "not applicable"]


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        check: The check's name.
        level: 0 to 6.
        status: `known failure` for a declared failure; `failed` also if a check passes that is declared to fail.
        detail: Why it did not pass.
        figures: What the check measured.
        trace: The traceback of an unexpected exception.
    """

    check: str
    level: int
    status: Status
    detail: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    trace: str = ""


def outcome_of(check: Check, kit: Kit) -> Outcome:
    """Run one check. Any exception means that it failed."""
    kit.figures, trace = {}, ""
    status: Status = "failed"
    try:
        check.run(kit)
        status, detail = "passed", ""
    except NotApplicableError as reason:
        status, detail = "not applicable", str(reason)
    except CheckFailedError as error:
        detail = str(error)
    except Exception as error:
        detail, trace = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
    known = next((known for known in kit.declared.known_failures if known.check == check.name), None)
    if known is not None:
        match status:
            case "failed":
                status, detail, trace = "known failure", f"{known} ({detail})", ""
            case "passed":
                status, detail = "failed", f"it passes, but is declared to fail ({known}); remove that declaration."
            case _:
                status, detail = "failed", f"it is declared to fail ({known}), but does not apply: {detail}"
    return Outcome(check.name, check.level, status, detail, kit.figures, trace)


def run_checks(
    declared: BackendUnderTest, folder: Path, *, checks: Sequence[Check] = CHECKS, seed: int = 0
) -> tuple[Outcome, ...]:
    """Run checks on a backend, without pytest.

    Args:
        declared: The backend.
        folder: An empty folder to work in.
        checks: The checks to run.
        seed: Seed of the weights, patches and grids.
    """
    refuse_unknown_checks(declared)
    with closing(Kit(declared, folder, seed)) as kit:
        return tuple(outcome_of(check, kit) for check in checks)


def refuse_unknown_checks(declared: BackendUnderTest) -> None:
    """Raise ConfigurationError if a known failure is of a check that does not exist, and so would never pass."""
    unknown = {known.check for known in declared.known_failures} - {check.name for check in CHECKS}
    if unknown:
        raise ConfigurationError(
            f"unknown check {', '.join(sorted(unknown))} in the known failures of backend {declared.backend!r}.",
            hint="Choose a check of the table in docs/conformance.md, or remove the known failure.",
        )


def conformance_suite(declared: BackendUnderTest | Callable[[pytest.Config], BackendUnderTest]) -> type:
    """Return a class with a test for each check; assign it in a test file to a name that starts with `Test`.

    Args:
        declared: The backend, or a function that returns it for pytest's configuration.
    """
    import pytest

    if isinstance(declared, BackendUnderTest):
        refuse_unknown_checks(declared)

    class TestConformance:
        """The kit's checks on one backend. `conformance_kit` is a fixture of this package's pytest plug-in."""

        under_test = staticmethod(declared if callable(declared) else lambda _: declared)

        @pytest.mark.parametrize("check", [pytest.param(check, id=check.name) for check in CHECKS])
        def test_check(
            self, check: Check, conformance_kit: Kit, record_property: Callable[[str, object], None]
        ) -> None:
            outcome = outcome_of(check, conformance_kit)
            found = {"declared": conformance_kit.declared.stated(conformance_kit.seed), "outcome": asdict(outcome)}
            record_property(PROPERTY, json.dumps({"label": conformance_kit.declared.label, **found}))
            if outcome.status == "failed":
                pytest.fail(f"This does not hold: {check.title}.\n{outcome.detail}\n{outcome.trace}", pytrace=False)
            if outcome.status == "known failure":
                pytest.xfail(outcome.detail)
            if outcome.status == "not applicable":
                pytest.skip(outcome.detail)

    return TestConformance
