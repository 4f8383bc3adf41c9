"""Tables of the conformance kit: its checks, and what the last run found of this repository's backends."""

from pathlib import Path

from visionaccel_testing.conformance import CHECKS
from visionaccel_testing.conformance.check import LEVELS
from visionaccel_testing.conformance.report import ConformanceReport

__all__ = ["REPORTS", "check_table", "support_table"]

REPORTS = Path(__file__).parents[2] / ".venv" / "conformance"
"""Where `make test` leaves the reports."""


def check_table() -> str:
    """Every check with what is right if it passes."""
    rows = ["| check | level | what is right |", "|---|---|---|"]
    rows += [f"| `{check.name}` | {LEVELS[check.level]} | {check.title} |" for check in CHECKS]
    return "\n".join(rows)


def support_table(folder: Path = REPORTS) -> str:
    """A row for each report in a folder: the badge, and why it is no better."""
    reports = [ConformanceReport.model_validate_json(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not reports:
        return "*No reports: `make test` has not run in this checkout.*"
    rows = [
        "| backend | badge | distribution | checks passed | for the next badge | digest |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        passed = sum(result.status == "passed" for result in report.results)
        counted = sum(result.status != "not applicable" for result in report.results)
        missing = report.missing.replace("|", "\\|") or "nothing"
        rows.append(
            f"| `{report.backend}` | {report.badge} | {report.distribution} | {passed} of {counted} | {missing} "
            f"| `{report.digest[:12]}` |"
        )
    return "\n".join(rows)
