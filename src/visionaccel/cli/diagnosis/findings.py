"""Findings with what they are about, and the looks that give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from visionaccel.backends import Finding, contained
from visionaccel.backends.spec import Status
from visionaccel.errors import VisionAccelError


@dataclass(frozen=True, slots=True)
class Found:
    """A finding and what it is about.

    Attributes:
        about: A part of the set-up, such as `environment` or `vLLM`, or the name of a backend.
        finding: What was looked at and found.
    """

    about: str
    finding: Finding

    def row(self) -> dict[str, str]:
        """As `--json` prints it."""
        found = self.finding
        return {
            "about": self.about,
            "what": found.name,
            "status": found.status,
            "found": found.detail,
            "fix": found.fix,
        }


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        version: Of visionaccel.
        created: Time in ISO 8601.
        findings: In the order of looking.
    """

    version: str
    created: str
    findings: tuple[Found, ...]

    def count(self, status: Status) -> int:
        """How many findings have that status."""
        return sum(each.finding.status == status for each in self.findings)

    def document(self) -> dict[str, Any]:
        """As `--json` prints it."""
        rows = [each.row() for each in self.findings]
        return {"version": self.version, "created": self.created, "findings": rows}


def looked(about: str, name: str, look: Callable[[], Iterable[Finding]]) -> list[Found]:
    """What a look finds; if it raises, that is what was found.

    Args:
        about: What the findings are about.
        name: What is looked at, for the finding that the look itself failed.
        look: Looks.
    """
    findings: list[Finding] = []
    try:
        with contained():
            findings.extend(look())  # what was found before it raises is kept
    except VisionAccelError as error:
        findings.append(Finding(name, "failure", error.message, error.hint or ""))
    except Exception as error:  # A broken machine is what this is for: the other looks are still to be made.
        findings.append(Finding(name, "failure", f"{type(error).__name__}: {error}", "Look at it by hand."))
    return [Found(about, finding) for finding in findings]
