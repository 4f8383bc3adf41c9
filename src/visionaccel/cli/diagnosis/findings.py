"""Findings with what they are about, and the looks that give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from visionaccel.backends import Finding, contained
from visionaccel.backends.spec import Status
from visionaccel.errors import VisionAccelError


class Found(NamedTuple):
    """A finding, and what it is about: a part of the set-up such as `environment` or `vLLM`, or a backend's name."""

    about: str
    finding: Finding


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found, in the order of looking; `created` is a time in ISO 8601."""

    version: str
    created: str
    findings: tuple[Found, ...]

    def count(self, status: Status) -> int:
        """How many findings have that status."""
        return sum(finding.status == status for _, finding in self.findings)

    def document(self) -> dict[str, Any]:
        """As `--json` prints it."""
        rows = [
            {"about": about, "what": found.name, "status": found.status, "found": found.detail, "fix": found.fix}
            for about, found in self.findings
        ]
        return {"version": self.version, "created": self.created, "findings": rows}


def looked(name: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a look finds; if it raises, a finding of that name says so, after those from before it raised."""
    findings: list[Finding] = []
    try:
        with contained():
            findings.extend(look())
    except VisionAccelError as error:
        findings.append(Finding(name, "failure", error.message, error.hint or ""))
    except Exception as error:  # A broken machine is what this is for: the other looks are still to be made.
        findings.append(Finding(name, "failure", f"{type(error).__name__}: {error}", "Look at it by hand."))
    return findings
