"""The machine, what is installed on it, and the settings."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import cache, partial
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from visionaccel.backends import AUTO, Finding, Registry
from visionaccel.cli.diagnosis.findings import looked
from visionaccel.core.cache_folder import cache_home
from visionaccel.core.cores import choose_cores, process_cores, shown_cores
from visionaccel.core.cpu import flags_in, processor_name
from visionaccel.errors import SettingsError, UnknownBackendError
from visionaccel.settings import PREFIX, Settings, load_settings

_ROOT = Path("/")
_PYTHON = (3, 11)
_GIB = 2**30
_LEAST_MEMORY, _LEAST_DISK = 4 * _GIB, 2 * _GIB

USEFUL = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""Instruction sets that matrix products are faster with, as Linux names them on x86 and Arm."""


def of_environment(root: Path = _ROOT) -> Iterator[Finding]:
    """What is found of the machine; a look that fails is itself a finding.

    Args:
        root: Where `/proc` and `/sys` are.
    """
    looks: Mapping[str, Callable[[], Finding]] = {
        "Python": _python,
        "system": _system,
        "kernel": lambda: Finding("kernel", "pass", platform.release()),
        "processor": lambda: _processor(root),
        "memory": lambda: _memory(root),
        "disk": _disk,
        "cores": _cores,
    }
    for name, look in looks.items():
        for found in looked("", name, lambda look=look: [look()]):  # type: ignore[misc]
            yield found.finding


def _python() -> Finding:
    detail = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    if sys.version_info[:2] < _PYTHON:
        return Finding("Python", "failure", detail, f"Use Python {'.'.join(map(str, _PYTHON))} or later.")
    return Finding("Python", "pass", detail)


def _system() -> Finding:
    named = platform.system()
    with suppress(OSError):
        named = f"{named}, {platform.freedesktop_os_release()['PRETTY_NAME']}"
    detail = f"{named}, {platform.machine()}"
    if platform.system() != "Linux":
        return Finding("system", "warning", detail, "Use Linux, which is what visionaccel is tested on.")
    return Finding("system", "pass", detail)


def _processor(root: Path) -> Finding:
    flags = flags_in((root / "proc/cpuinfo").read_text())
    useful = [name for name in USEFUL if name in flags]
    detail = f"{processor_name()}; {' '.join(useful) or 'none of the useful instruction sets'}"
    if not flags & {"avx2", "asimd"}:
        return Finding("processor", "warning", detail, "Encodes on this processor are slow; use one with AVX2 or Neon.")
    return Finding("processor", "pass", detail)


def _memory(root: Path) -> Finding:
    fields = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, amount = line.partition(":")
        fields[name] = int(amount.split()[0]) * 1024
    total, available = fields["MemTotal"], fields["MemAvailable"]
    detail = f"{_gib(available)} of {_gib(total)} available"
    limit = _limit(root)
    if limit is not None and limit < total:
        detail += f", and this process may use {_gib(limit)}"
        available = min(available, limit)
    if available < _LEAST_MEMORY:
        fix = "End what else needs memory: the weights of a 7B model's vision encoder take 2.5 GiB in float32."
        return Finding("memory", "warning", detail, fix)
    return Finding("memory", "pass", detail)


def _limit(root: Path) -> int | None:
    """The limit of this process's container, if it has one."""
    with suppress(OSError, ValueError):
        return int((root / "sys/fs/cgroup/memory.max").read_text())
    return None


def _disk() -> Finding:
    cache = cache_home()
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    detail = f"{_gib(free)} free for {cache}"
    if not os.access(there, os.W_OK):
        fix = "Set XDG_CACHE_HOME to a folder that can be written to; otherwise digests are computed at every start."
        return Finding("disk", "warning", f"{detail}, which cannot be written to", fix)
    if free < _LEAST_DISK:
        return Finding("disk", "warning", detail, "Free some: compiled programs and downloads are kept there.")
    return Finding("disk", "pass", detail)


def _cores() -> Finding:
    """Cores of the CPU that encoders may use here."""
    try:
        wanted = load_settings().cpu_cores
    except SettingsError:  # the settings have their own finding
        wanted = None
    return Finding("cores", "pass", shown_cores(choose_cores(wanted).cores or process_cores()))


def _gib(amount: int) -> str:
    return f"{amount / _GIB:.1f} GiB"


_CORE = "visionaccel"
_COMPANIONS = ("visionaccel-digits-vlm",)
_SHOWN = ("numpy", "torch", "onnxruntime", "openvino", "vllm", "transformers")
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
    for name in dict.fromkeys((_CORE, *_COMPANIONS, *sorted(plugins))):
        # One whose metadata is broken is a finding; the others are still to be looked at.
        yield from (found.finding for found in looked("", name, partial(_of_distribution, name)))
    for name in _SHOWN:
        yield Finding(name, "pass", installed(name) or "not installed")


def _of_distribution(name: str) -> Iterator[Finding]:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        if name == _CORE:
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


def of_settings(registry: Registry | None) -> Iterator[Finding]:
    """What is found of the environment's settings.

    Args:
        registry: The installed backends, which settings name; None if they are not known.

    Raises:
        SettingsError: If a value is invalid.
    """
    yield from unknown_variables(os.environ)
    settings = load_settings()
    given = [f"{name}={os.environ[name]}" for name in sorted(_known()) if os.environ.get(name)]
    yield Finding("variables", "pass", ", ".join(given) or "none is set")
    wanted = [("BACKEND", settings.backend), *(("FALLBACK", name) for name in settings.fallback)]
    for field, name in wanted:
        if registry is not None and name not in (None, AUTO):
            yield from _named(registry, f"{PREFIX}{field}", name)
    if AUTO in settings.fallback:
        fix = "Name a backend, such as torch_ref."
        yield Finding(f"{PREFIX}FALLBACK", "failure", f"{AUTO!r}: a fallback must be named", fix)
    if settings.bundle is not None and not settings.bundle.is_dir():
        fix = "Run `visionaccel pull`, or correct the path."
        yield Finding(f"{PREFIX}BUNDLE", "failure", f"{settings.bundle} is not a folder", fix)


def unknown_variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that begin as settings do and are none."""
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in _known():
            near = get_close_matches(name, _known(), 1)
            fix = f"Did you mean {near[0]}?" if near else "Unset it, or see the table of settings."
            yield Finding(name, "warning", "not a setting, and ignored", fix)


def _known() -> set[str]:
    return {PREFIX + name.upper() for name in Settings.model_fields}


def _named(registry: Registry, variable: str, backend: str) -> Iterator[Finding]:
    try:
        registry.entry(backend)
    except UnknownBackendError as error:
        yield Finding(variable, "failure", error.message, error.hint or "")
