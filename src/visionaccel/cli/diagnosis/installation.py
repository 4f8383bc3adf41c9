"""The machine, what is installed on it, and the settings."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
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
from visionaccel.settings import PREFIX, VARIABLES, Settings, load_settings, unknown_variables

_GIB = 2**30
_LEAST_MEMORY, _LEAST_DISK = 4 * _GIB, 2 * _GIB
_USEFUL = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""Instruction sets that matrix products are faster with, as Linux names them on x86 and Arm."""

_CORE = "visionaccel"
_SHOWN = ("numpy", "torch", "onnxruntime", "openvino", "vllm", "transformers")
"""What answers depend on, whichever backend encodes."""


def valid_settings() -> Settings | None:
    """The environment's settings; None if a value is invalid, which `of_settings` finds."""
    with suppress(SettingsError):
        return load_settings()
    return None


def of_environment(root: Path = Path("/")) -> Iterator[Finding]:
    """What is found of the machine, whose `/proc` and `/sys` are below `root`."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    yield Finding("Python", "pass", f"{python}, {sys.executable}")
    yield Finding("kernel", "pass", platform.release())
    looks: Mapping[str, Callable[[], Iterator[Finding]]] = {
        "system": _system,
        "processor": partial(_processor, root),
        "memory": partial(_memory, root),
        "disk": _disk,
        "cores": _cores,
    }
    for name, look in looks.items():
        yield from looked(name, look)


def _system() -> Iterator[Finding]:
    named = platform.system()
    with suppress(OSError):
        named = f"{named}, {platform.freedesktop_os_release()['PRETTY_NAME']}"
    detail = f"{named}, {platform.machine()}"
    if platform.system() != "Linux":
        yield Finding("system", "warning", detail, "Use Linux, which is what visionaccel is tested on.")
    else:
        yield Finding("system", "pass", detail)


def _processor(root: Path) -> Iterator[Finding]:
    flags = flags_in((root / "proc/cpuinfo").read_text())
    useful = " ".join(name for name in _USEFUL if name in flags) or "none of the useful instruction sets"
    detail = f"{processor_name()}; {useful}"
    if not flags & {"avx2", "asimd"}:
        yield Finding("processor", "warning", detail, "Encodes on this processor are slow; use one with AVX2 or Neon.")
    else:
        yield Finding("processor", "pass", detail)


def _memory(root: Path) -> Iterator[Finding]:
    lines = (line.partition(":") for line in (root / "proc/meminfo").read_text().splitlines())
    kibibytes = {name: int(amount.split()[0]) for name, _, amount in lines}
    total, available = kibibytes["MemTotal"] * 1024, kibibytes["MemAvailable"] * 1024
    detail = f"{_gib(available)} of {_gib(total)} available"
    limit = total
    with suppress(OSError, ValueError):  # of this process's container, if it has one
        limit = int((root / "sys/fs/cgroup/memory.max").read_text())
    if limit < total:
        detail += f", and this process may use {_gib(limit)}"
    if min(available, limit) < _LEAST_MEMORY:
        fix = "End what else needs memory: the weights of a 7B model's vision encoder take 2.5 GiB in float32."
        yield Finding("memory", "warning", detail, fix)
    else:
        yield Finding("memory", "pass", detail)


def _disk() -> Iterator[Finding]:
    cache = cache_home()
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    detail = f"{_gib(free)} free for {cache}"
    if not os.access(there, os.W_OK):
        fix = "Set XDG_CACHE_HOME to a folder that can be written to; otherwise digests are computed at every start."
        yield Finding("disk", "warning", f"{detail}, which cannot be written to", fix)
    elif free < _LEAST_DISK:
        yield Finding("disk", "warning", detail, "Free some: compiled programs and downloads are kept there.")
    else:
        yield Finding("disk", "pass", detail)


def _cores() -> Iterator[Finding]:
    """Cores of the CPU that encoders may use here."""
    settings = valid_settings()
    cores = choose_cores(settings.cpu_cores if settings else None).cores
    yield Finding("cores", "pass", shown_cores(cores or process_cores()))


def _gib(amount: int) -> str:
    return f"{amount / _GIB:.1f} GiB"


def installed(name: str) -> str | None:
    """Version of a distribution, or of a build of it under another name, such as ONNX Runtime's for GPUs."""
    try:
        return version(name)
    except PackageNotFoundError:
        others = _providers().get(name.replace("-", "_"), [])
        return version(others[0]) if others else None


@cache
def _providers() -> Mapping[str, list[str]]:
    return packages_distributions()


def of_versions(plugins: Iterable[str]) -> Iterator[Finding]:
    """Versions, and what the requirements of the core and of the plug-ins, by their distributions' names, lack here."""
    for name in dict.fromkeys((_CORE, "visionaccel-digits-vlm", *sorted(plugins))):
        # One whose metadata is broken is a finding; the others are still to be looked at.
        yield from looked(name, partial(_of_distribution, name))
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
    """What is wrong with one requirement of a distribution. Of an extra's, only another version is, as a warning."""
    name, needs = f"{needing.name} {needing.version}", text.partition(";")[0].strip()
    try:
        requirement = Requirement(text)
        found = installed(requirement.name)
        marker, extras = requirement.marker, needing.metadata.get_all("Provides-Extra") or ()
        brought_by = [extra for extra in ("", *extras) if marker is None or marker.evaluate({"extra": extra})]
        always = "" in brought_by
        fits = not always if found is None else requirement.specifier.contains(found, prereleases=True)
    except (InvalidRequirement, InvalidVersion) as error:
        return Finding(needing.name, "warning", f"{name} requires {needs!r}, which cannot be read: {error}", "")
    if fits or requirement.url is not None or not brought_by:
        return None
    there = "it is not installed" if found is None else f"{found} is installed"
    fix = f"pip install {shlex.quote(f'{requirement.name}{requirement.specifier}')}"
    if always:
        return Finding(needing.name, "failure", f"{name} needs {needs}, and {there}", fix)
    return Finding(needing.name, "warning", f"an extra of {name} needs {needs}, and {there}", fix)


def of_settings(registry: Registry | None) -> Iterator[Finding]:
    """What is found of the environment's settings, and of the backends that they name if a registry is given."""
    for variable, near in unknown_variables().items():
        fix = f"Did you mean {near}?" if near else "Unset it, or see the table of settings."
        yield Finding(variable, "warning", "not a setting, and ignored", fix)
    settings = load_settings()
    given = [f"{name}={os.environ[name]}" for name in sorted(VARIABLES) if os.environ.get(name)]
    yield Finding("variables", "pass", ", ".join(given) or "none is set")
    for field, backend in [("BACKEND", settings.backend), *(("FALLBACK", name) for name in settings.fallback)]:
        if registry is not None and backend not in (None, AUTO):
            try:
                registry.entry(backend)
            except UnknownBackendError as error:
                yield Finding(f"{PREFIX}{field}", "failure", error.message, error.hint or "")
    if AUTO in settings.fallback:
        fix = "Name a backend, such as torch_ref."
        yield Finding(f"{PREFIX}FALLBACK", "failure", f"{AUTO!r}: a fallback must be named", fix)
    if settings.bundle is not None and not settings.bundle.is_dir():
        fix = "Run `visionaccel pull`, or correct the path."
        yield Finding(f"{PREFIX}BUNDLE", "failure", f"{settings.bundle} is not a folder", fix)
