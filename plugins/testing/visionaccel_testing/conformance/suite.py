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
from visionaccel_testing.conformance.numbers import NUMBERS
from visionaccel_testing.conformance.shapes import SHAPES
from visionaccel_testing.conformance.speed import SPEED

if TYPE_CHECKING:
    import pytest

CHECKS: tuple[Check, ...] = tuple(
    check for level in (INTERFACE, SHAPES, NUMBERS, DETERMINISM, LIFE_CYCLE, FAULTS, SPEED) for check in level.found
)
"""Every check, level by level."""

PROPERTY = "visionaccel-conformance"
"""Name of the property of a pytest report: JSON of a backend's label, what is declared of it, and the outcome."""

Status: TypeAlias = Literal["passed", "failed", "known failure", "not applicable"]


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        check: Its name.
        level: 0 to 6.
        status: `known failure` for one that was declared; `failed` also if a declared one passes.
        detail: Why, unless it passed.
        figures: What it measured.
        trace: Where an unexpected exception came from.
    """

    check: str
    level: int
    status: Status
    detail: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    trace: str = ""


def outcome_of(check: Check, kit: Kit) -> Outcome:
    """Run one check. An exception in it is its failure."""
    kit.figures = {}
    status, detail, trace = _tried(check, kit)
    known = next((known for known in kit.declared.known_failures if known.check == check.name), None)
    if known is not None:
        match status:
            case "failed":
                status, detail, trace = "known failure", f"{known} ({detail})", ""
            case "passed":
                status, detail = "failed", f"it passes, but is declared as failing ({known}); remove that."
            case _:
                status, detail = "failed", f"it is declared as failing ({known}), and does not apply: {detail}"
    return Outcome(check.name, check.level, status, detail, kit.figures, trace)


def _tried(check: Check, kit: Kit) -> tuple[Status, str, str]:
    """Status, detail and trace of a check, without what is declared of it."""
    try:
        check.run(kit)
    except NotApplicableError as reason:
        return "not applicable", str(reason), ""
    except CheckFailedError as error:
        return "failed", str(error), ""
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
    return "passed", "", ""


def run_checks(
    declared: BackendUnderTest, folder: Path, *, checks: Sequence[Check] = CHECKS, seed: int = 0
) -> tuple[Outcome, ...]:
    """Run checks on a backend, without pytest.

    Args:
        declared: The backend.
        folder: An empty folder to work in.
        checks: Which checks.
        seed: Of the weights, patches and grids.
    """
    refuse_unknown_checks(declared)
    with closing(Kit(declared, folder, seed)) as kit:
        return tuple(outcome_of(check, kit) for check in checks)


def refuse_unknown_checks(declared: BackendUnderTest) -> None:
    """Refuse known failures of checks that do not exist, as they would never be found to pass."""
    unknown = {known.check for known in declared.known_failures} - {check.name for check in CHECKS}
    if unknown:
        raise ConfigurationError(
            f"there is no check {', '.join(sorted(unknown))}, which backend {declared.backend!r} is declared to fail.",
            hint="docs/conformance.md names the checks; remove or rename what is declared.",
        )


def conformance_suite(declared: BackendUnderTest | Callable[[pytest.Config], BackendUnderTest]) -> type:
    """A class with a test for each check, to be bound in a test file to a name that starts with `Test`.

    Args:
        declared: The backend, or what makes it from pytest's configuration.
    """
    import pytest

    if isinstance(declared, BackendUnderTest):
        refuse_unknown_checks(declared)

    class TestConformance:
        """The checks of the kit on one backend. `conformance_kit` is a fixture of this package's pytest plug-in."""

        under_test = staticmethod(declared if callable(declared) else lambda _: declared)

        @pytest.mark.parametrize("check", [pytest.param(check, id=check.name) for check in CHECKS])
        def test_check(
            self, check: Check, conformance_kit: Kit, record_property: Callable[[str, object], None]
        ) -> None:
            outcome = outcome_of(check, conformance_kit)
            found = {"declared": conformance_kit.declared.stated(conformance_kit.seed), "outcome": asdict(outcome)}
            record_property(PROPERTY, json.dumps({"label": conformance_kit.declared.label, **found}))
            if outcome.status == "failed":
                pytest.fail(f"NOT SO: {check.title}.\n{outcome.detail}\n{outcome.trace}", pytrace=False)
            if outcome.status == "known failure":
                pytest.xfail(outcome.detail)
            if outcome.status == "not applicable":
                pytest.skip(outcome.detail)

    return TestConformance
