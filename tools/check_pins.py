"""Checks that `constraints.txt` and `locked.txt` pin everything that is installed, to the version that is installed."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

FILES = ("constraints.txt", "locked.txt")
COMES_WITH_PYTHON = frozenset({"pip"})


def main() -> int:
    """Prints what differs; returns 1 if anything does."""
    folder = Path(__file__).parent
    pinned = {name: version for file in FILES for name, version in pins((folder / file).read_text()).items()}
    found = differences(installed(), pinned)
    for line in found:
        print(line)
    return 1 if found else 0


def pins(text: str) -> dict[str, str]:
    """Versions by name, from lines such as `numpy==2.3.5`."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def installed() -> dict[str, str]:
    """Versions of this environment's distributions by name, without those that were installed from a folder."""
    return {
        normal(each.name): each.version.partition("+")[0]  # torch's says for which device it was built
        for each in distributions()
        if each.read_text("direct_url.json") is None
    }


def differences(found: Mapping[str, str], pinned: Mapping[str, str]) -> list[str]:
    """A line for each distribution that is not pinned, or to another version."""
    return [
        f"{name} {version} is installed, and {' and '.join(FILES)} pin {pinned.get(name, 'none')}."
        for name, version in sorted(found.items())
        if name not in COMES_WITH_PYTHON and pinned.get(name) != version
    ]


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
