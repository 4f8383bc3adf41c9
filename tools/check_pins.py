"""Checks that `constraints.txt` and `locked.txt` pin every installed distribution to its installed version."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

FILES = ("constraints.txt", "locked.txt")
COMES_WITH_PYTHON = frozenset({"pip"})


def main() -> int:
    """Print the differences; return 1 if there are any."""
    folder = Path(__file__).parent
    pinned = {name: version for file in FILES for name, version in pins((folder / file).read_text()).items()}
    found = differences(installed(), pinned)
    for line in found:
        print(line)
    return 1 if found else 0


def pins(text: str) -> dict[str, str]:
    """Return versions by name, from lines such as `numpy==2.3.5`."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def installed() -> dict[str, str]:
    """Return the versions of this environment's distributions by name, except those installed from a folder."""
    return {
        normal(each.name): each.version.partition("+")[0]  # after the +, torch names the device that it was built for
        for each in distributions()
        if each.read_text("direct_url.json") is None
    }


def differences(found: Mapping[str, str], pinned: Mapping[str, str]) -> list[str]:
    """Return a line for each distribution that is not pinned, or is pinned to a different version."""
    return [
        f"{name} {version} is installed, but {' and '.join(FILES)} pin {pinned.get(name, 'none')}."
        for name, version in sorted(found.items())
        if name not in COMES_WITH_PYTHON and pinned.get(name) != version
    ]


def normal(name: str) -> str:
    """Return a distribution's name in the form in which package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
