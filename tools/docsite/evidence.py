"""The results of a run of all tests, from `docs/evidence.json`, and tables that show them."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree  # nosec B405 # reads what pytest has written

from visionaccel_testing.conformance.report import ConformanceReport

__all__ = ["EVIDENCE", "PROPERTY", "RAN", "Badge", "Evidence", "badge_table", "committed", "evidence_table", "found_in"]

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence.json"
PROPERTY = "evidence: "
"""Prefix of the properties that tests record. The name says what was shown, the value on how many prompts or files."""

RAN = "ran: "
"""Prefix of the properties `ran: FAMILY: BACKEND: FORM`: the backend computed that form of the family's tower."""


class Badge(NamedTuple):
    """The conformance kit's result for a backend: checks that passed, checks that apply, what the next badge needs."""

    badge: str
    passed: int
    applies: int
    missing: str


class Evidence(NamedTuple):
    """What the tests showed.

    Attributes:
        shown: The sum of the numbers that passing tests recorded, by what they show.
        badges: For each backend that the conformance kit checked.
        ran: The forms of a family's tower that a backend computed, by `FAMILY: BACKEND`.
    """

    shown: dict[str, int]
    badges: dict[str, Badge]
    ran: dict[str, list[str]]


def committed() -> Evidence:
    """Return the evidence that the pages show."""
    found = json.loads(EVIDENCE.read_text())
    return Evidence(found["shown"], {name: Badge(*badge) for name, badge in found["badges"].items()}, found["ran"])


def found_in(results: Path, reports: Path) -> Evidence:
    """Return the evidence of one run.

    Args:
        results: A folder with pytest's JUnit files. The properties of a test that did not pass do not count.
        reports: A folder with reports of the conformance kit.
    """
    shown: Counter[str] = Counter()
    ran: dict[str, set[str]] = defaultdict(set)
    for path in sorted(results.glob("*.xml")):
        for name, value in _recorded(path):
            if name.startswith(PROPERTY):
                shown[name.removeprefix(PROPERTY)] += int(value)
            elif name.startswith(RAN):
                where, _, form = name.removeprefix(RAN).rpartition(": ")
                ran[where].add(form)
    badges = {}
    for path in sorted(reports.glob("*.json")):
        report = ConformanceReport.model_validate_json(path.read_text())
        applies = [result for result in report.results if result.status != "not applicable"]
        passed = sum(result.status == "passed" for result in applies)
        badges[report.backend] = Badge(str(report.badge), passed, len(applies), report.missing)
    return Evidence(dict(sorted(shown.items())), badges, {where: sorted(ran[where]) for where in sorted(ran)})


def _recorded(path: Path) -> Iterator[tuple[str, str]]:
    for case in ElementTree.parse(path).iter("testcase"):  # nosec B314 # as above
        if all(case.find(outcome) is None for outcome in ("failure", "error", "skipped")):
            for each in case.iter("property"):
                yield each.get("name", ""), each.get("value", "0")


def evidence_table() -> str:
    """Return a table with a row for each thing that the tests show."""
    rows = [f"| {what} | {number} |" for what, number in committed().shown.items()]
    return "\n".join(["| shown on every change | number |", "|---|---|", *rows])


def badge_table() -> str:
    """Return a table with each backend that the conformance kit checked: its badge, and what the next badge needs."""
    rows = ["| backend | badge | checks passed | for the next badge |", "|---|---|---|---|"]
    for backend, (badge, passed, applies, missing) in committed().badges.items():
        rows.append(
            f"| `{backend}` | {badge} | {passed} of {applies} | {missing.replace('|', chr(92) + '|') or 'nothing'} |"
        )
    return "\n".join(rows)
