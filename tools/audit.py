"""Asks an advisory service about vulnerabilities of installed distributions: `python tools/audit.py SITE_PACKAGES`.

It runs in a separate environment that has pip-audit. It fails if the service lists a vulnerability. If no service can
be reached, it says so and succeeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_MOST_LISTED = 10
_UNREACHED = ("ConnectionError", "ServiceError", "Max retries", "timed out", "NameResolutionError")


def main() -> int:
    """Print the verdict; return 1 if there are vulnerabilities."""
    options = ["--format", "json", "--progress-spinner", "off"]
    command = [sys.executable, "-m", "pip_audit", "--path", sys.argv[1], *options]
    done = subprocess.run(command, capture_output=True, text=True)
    failed, text = verdict(done.stdout, done.stderr)
    print(text)
    return 1 if failed else 0


def verdict(output: str, errors: str) -> tuple[bool, str]:
    """Return whether an audit failed, and a summary to print.

    Args:
        output: What pip-audit printed to stdout: JSON, or nothing if it could not ask the service.
        errors: What pip-audit printed to stderr.
    """
    try:
        every: Sequence[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        reason = (errors.strip().splitlines() or ["no reason given"])[-1]
        if "usage:" in errors or ("Traceback" in errors and not any(word in errors for word in _UNREACHED)):
            return True, f"AUDIT FAILED TO RUN: {reason}"
        return False, f"AUDIT SKIPPED: no advisory service could be asked: {reason}"
    audited = [each for each in every if "skip_reason" not in each]
    unknown = [each["name"] for each in every if "skip_reason" in each]
    if not audited:
        return False, f"AUDIT SKIPPED: no advisory service answers for any of the {len(every)} distributions."
    lines = [
        f"{each['name']} {each['version']}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'no version'}"
        for each in audited
        for found in each["vulns"]
    ]
    more = f" and {len(unknown) - _MOST_LISTED} more" if len(unknown) > _MOST_LISTED else ""
    ignored = f" The service does not know {', '.join(unknown[:_MOST_LISTED])}{more}." if unknown else ""
    summary = f"{len(audited)} distributions audited, {len(lines)} vulnerabilities.{ignored}"
    return bool(lines), "\n".join([*lines, summary])


if __name__ == "__main__":
    sys.exit(main())
