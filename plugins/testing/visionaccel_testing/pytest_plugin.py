"""pytest plug-in: options to check an installed backend, and a report of the outcomes. Imports little."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from visionaccel_testing.conformance.kit import Kit
    from visionaccel_testing.conformance.suite import Outcome

_WORSE = ("not applicable", "passed", "known failure", "failed")
"""The statuses of a check, the worst last."""

_SUITE = Path(__file__).parent / "conformance" / "installed_suite.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the kit."""
    group = parser.getgroup("visionaccel", "conformance of visionaccel's backends")
    group.addoption(
        "--visionaccel-backend", metavar="NAME", help="Run the conformance suite on this installed backend."
    )
    group.addoption("--visionaccel-device", metavar="DEVICE", help="One of its devices, such as npu:0.")
    group.addoption(
        "--visionaccel-options", metavar="OPTIONS", help="Its options: name=value,name=value or a JSON object."
    )
    group.addoption("--visionaccel-seed", metavar="N", type=int, default=0, help="Seed of weights, images and grids.")
    group.addoption(
        "--visionaccel-report",
        metavar="FOLDER",
        type=Path,
        help="Write a report of each backend as JSON, Markdown and SVG.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the suite instead of the current folder's tests, or in addition to the tests on the command line."""
    if config.getoption("--visionaccel-backend"):
        named = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
        config.args = [*named, str(_SUITE)]
    folder = config.getoption("--visionaccel-report")
    if folder is not None and not hasattr(config, "workerinput"):  # workers of pytest-xdist report to their controller
        config.pluginmanager.register(_Reporter(folder), "visionaccel-report")


@pytest.fixture(scope="class")
def conformance_kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """The kit on the backend that a class made by `conformance_suite` declares."""
    from visionaccel_testing.conformance.kit import Kit
    from visionaccel_testing.conformance.suite import refuse_unknown_checks

    declared = request.cls.under_test(request.config)
    refuse_unknown_checks(declared)
    folder, seed = tmp_path_factory.mktemp("conformance"), request.config.getoption("--visionaccel-seed")
    with closing(Kit(declared, folder, seed)) as kit:
        yield kit


class _Reporter:
    """Writes reports of the outcomes of the kit's tests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, dict[str, Outcome]] = {}
        self._declared: dict[str, list[dict[str, Any]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        from visionaccel_testing.conformance.suite import PROPERTY, Outcome

        for name, value in report.user_properties:
            if name == PROPERTY:
                found = json.loads(str(value))
                outcome, outcomes = Outcome(**found["outcome"]), self._found.setdefault(found["label"], {})
                declared = self._declared.setdefault(found["label"], [])
                if found["declared"] not in declared:
                    declared.append(found["declared"])
                # If two suites have the same label, the worse outcome counts.
                before = outcomes.get(outcome.check, outcome)
                outcomes[outcome.check] = max(before, outcome, key=lambda each: _WORSE.index(each.status))

    def pytest_sessionfinish(self) -> None:
        from visionaccel_testing.conformance.report import write_report

        for label, outcomes in self._found.items():
            write_report(label, list(outcomes.values()), self._folder, self._declared[label])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        from visionaccel_testing.conformance.report import badge_of

        for label, outcomes in self._found.items():
            badge = badge_of(list(outcomes.values()))
            terminalreporter.write_line(f"visionaccel conformance of {label}: {badge}")
