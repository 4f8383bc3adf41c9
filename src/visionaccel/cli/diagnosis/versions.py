"""Versions of what is installed, held against what this package's distributions require."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from functools import cache, partial
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions, version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from visionaccel.backends import Finding
from visionaccel.cli.diagnosis.findings import looked

__all__ = ["installed", "of_versions"]

CORE = "visionaccel"
COMPANIONS = ("visionaccel-digits-vlm",)
SHOWN = ("numpy", "torch", "onnxruntime", "openvino", "vllm", "transformers")
"""What answers depend on, whichever backend encodes."""


def installed(name: str) -> str | None:
    """Version of what provides a distribution; None if nothing does.

    Some packages come in builds under other names, such as those of ONNX Runtime for GPUs: what provides the module of
    that name counts as well.
    """
    try:
        return version(name)
    except PackageNotFoundError:
        others = _providers().get(name.replace("-", "_"), [])
        return version(others[0]) if others else None


def of_versions(plugins: Iterable[str]) -> Iterator[Finding]:
    """Versions, and requirements that what is installed does not meet.

    Args:
        plugins: Names of the distributions that provide backends.
    """
    for name in dict.fromkeys((CORE, *COMPANIONS, *sorted(plugins))):
        # One whose metadata is broken is a finding; the others are still to be looked at.
        yield from (found.finding for found in looked("", name, partial(_of_distribution, name)))
    for name in SHOWN:
        yield Finding(name, "pass", installed(name) or "not installed")


def _of_distribution(name: str) -> Iterator[Finding]:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        if name == CORE:
            yield Finding(name, "warning", "it runs from a folder and is not installed", "pip install visionaccel")
        return
    problems = [problem for text in found.requires or () if (problem := _problem(found, text)) is not None]
    if not any(problem.status == "failure" for problem in problems):
        yield Finding(name, "pass", found.version)
    yield from problems


def _problem(needing: Distribution, text: str) -> Finding | None:
    """What is wrong with one requirement of a distribution, if anything is.

    Those of an extra are not looked for; but one that is there in a version that does not fit is a warning.
    """
    name, needs = f"{needing.name} {needing.version}", text.partition(";")[0].strip()
    try:
        requirement = Requirement(text)
        found = installed(requirement.name)
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        fits = not always if found is None else requirement.specifier.contains(found, prereleases=True)
    except (InvalidRequirement, InvalidVersion) as error:
        return Finding(needing.name, "warning", f"{name} requires {needs!r}, which cannot be read: {error}", "")
    if fits or requirement.url is not None or not (always or _of_an_extra(requirement, needing)):
        return None
    there = "it is not installed" if found is None else f"{found} is installed"
    fix = f"pip install {shlex.quote(f'{requirement.name}{requirement.specifier}')}"
    if always:
        return Finding(needing.name, "failure", f"{name} needs {needs}, and {there}", fix)
    return Finding(needing.name, "warning", f"an extra of {name} needs {needs}, and {there}", fix)


def _of_an_extra(requirement: Requirement, needing: Distribution) -> bool:
    """Whether some extra brings a requirement here, rather than another system or another Python."""
    extras = needing.metadata.get_all("Provides-Extra") or []
    marker = requirement.marker
    return marker is not None and any(marker.evaluate({"extra": extra}) for extra in extras)


@cache
def _providers() -> dict[str, list[str]]:
    return {module: list(names) for module, names in packages_distributions().items()}
