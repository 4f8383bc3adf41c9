"""The checks of `visionaccel doctor` that need no child process, and the findings that every check makes."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from visionaccel.backends import AUTO, Finding, Registry, contained
from visionaccel.backends.spec import Status
from visionaccel.bundle import Certificate, is_bundle, open_bundle, read_golden
from visionaccel.cli.models import model_of
from visionaccel.core.cache_folder import cache_home
from visionaccel.core.cores import choose_cores, process_cores, shown_cores
from visionaccel.core.cpu import flags_in, processor_name
from visionaccel.encoder import open_tower
from visionaccel.errors import SettingsError, UnknownBackendError, VisionAccelError
from visionaccel.families import Tower
from visionaccel.settings import PREFIX, VARIABLES, Settings, load_settings, unknown_variables

_GIB = 2**30
_LEAST_MEMORY, _LEAST_DISK = 4 * _GIB, 2 * _GIB
_USEFUL = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""Instruction sets that make matrix products faster, as Linux names them on x86 and Arm."""

_CORE = "visionaccel"
_SHOWN = ("numpy", "torch", "onnxruntime", "openvino", "vllm", "transformers")
"""Distributions whose versions affect answers with every backend."""
_PROVE = "Run `visionaccel validate`."


class Found(NamedTuple):
    """A finding and what it is about: a part of the set-up such as `environment` or `vLLM`, or a backend's name."""

    about: str
    finding: Finding


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in the order in which they were made; `created` is a time in ISO 8601."""

    version: str
    created: str
    findings: tuple[Found, ...]

    def count(self, status: Status) -> int:
        """Count the findings with that status."""
        return sum(finding.status == status for _, finding in self.findings)

    def document(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        rows = [
            {"about": about, "what": found.name, "status": found.status, "found": found.detail, "fix": found.fix}
            for about, found in self.findings
        ]
        return {"version": self.version, "created": self.created, "findings": rows}


def looked(name: str, look: Callable[[], Finding | Iterable[Finding]]) -> list[Finding]:
    """Run a check and return its findings. If it raises, a further finding of that name says so."""
    findings: list[Finding] = []
    try:
        with contained():
            found = look()
            findings.extend([found] if isinstance(found, Finding) else found)
    except VisionAccelError as error:
        findings.append(Finding(name, "failure", error.message, error.hint or ""))
    except Exception as error:  # something on this machine is broken; the other checks must still run
        findings.append(Finding(name, "failure", f"{type(error).__name__}: {error}", "Check it manually."))
    return findings


def passed_unless(fix: str, name: str, detail: str) -> Finding:
    """Make a finding: a warning if `fix` says what to do, otherwise a pass."""
    return Finding(name, "warning" if fix else "pass", detail, fix)


def valid_settings() -> Settings | None:
    """Return the environment's settings; None if a value is invalid, which `of_settings` reports."""
    with suppress(SettingsError):
        return load_settings()
    return None


def of_environment(root: Path = Path("/")) -> Iterator[Finding]:
    """Check the machine, whose `/proc` and `/sys` are below `root`."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    yield Finding("Python", "pass", f"{python}, {sys.executable}")
    yield Finding("kernel", "pass", platform.release())
    yield from looked("system", _system)
    yield from looked("processor", lambda: _processor(root))
    yield from looked("memory", lambda: _memory(root))
    yield from looked("disk", _disk)
    yield from looked("cores", _cores)


def _system() -> Finding:
    system = platform.system()
    fix = "" if system == "Linux" else "Use Linux, on which visionaccel is tested."
    with suppress(OSError):
        system += f", {platform.freedesktop_os_release()['PRETTY_NAME']}"
    return passed_unless(fix, "system", f"{system}, {platform.machine()}")


def _processor(root: Path) -> Finding:
    flags = flags_in((root / "proc/cpuinfo").read_text())
    useful = " ".join(name for name in _USEFUL if name in flags) or "none of the useful instruction sets"
    fix = "" if flags & {"avx2", "asimd"} else "Encoding on this processor is slow; use one with AVX2 or Neon."
    return passed_unless(fix, "processor", f"{processor_name()}; {useful}")


def _memory(root: Path) -> Finding:
    lines = (line.partition(":") for line in (root / "proc/meminfo").read_text().splitlines())
    kibibytes = {name: int(amount.split()[0]) for name, _, amount in lines}
    total, available = kibibytes["MemTotal"] * 1024, kibibytes["MemAvailable"] * 1024
    detail = f"{_gib(available)} of {_gib(total)} available"
    limit = total
    with suppress(OSError, ValueError):  # of this process's container, if it has one
        limit = int((root / "sys/fs/cgroup/memory.max").read_text())
    if limit < total:
        detail += f", and this process may use {_gib(limit)}"
    fix = ""
    if min(available, limit) < _LEAST_MEMORY:
        fix = "Free some: the weights of a 7B model's vision encoder take 2.5 GiB in float32."
    return passed_unless(fix, "memory", detail)


def _disk() -> Finding:
    cache = cache_home()
    folder = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    detail, fix = f"{_gib(free)} free for {cache}", ""
    if not os.access(folder, os.W_OK):
        detail += ", which is not writable"
        fix = "Set XDG_CACHE_HOME to a writable folder; otherwise digests are computed at every start."
    elif free < _LEAST_DISK:
        fix = "Free some: compiled programs and downloads are kept there."
    return passed_unless(fix, "disk", detail)


def _cores() -> Finding:
    """Report the CPU cores that encoders may use."""
    settings = valid_settings()
    cores = choose_cores(settings.cpu_cores if settings else None).cores
    return Finding("cores", "pass", shown_cores(cores or process_cores()))


def _gib(amount: int) -> str:
    return f"{amount / _GIB:.1f} GiB"


def installed(name: str) -> str | None:
    """Return the version of a distribution, or of a build with a different name, such as ONNX Runtime for GPUs."""
    try:
        return version(name)
    except PackageNotFoundError:
        others = _providers().get(name.replace("-", "_"), [])
        return version(others[0]) if others else None


@cache
def _providers() -> Mapping[str, list[str]]:
    return packages_distributions()


def of_versions(plugins: Iterable[str]) -> Iterator[Finding]:
    """Check the versions and requirements of the core and of the plug-ins, given by their distributions' names."""
    for name in dict.fromkeys((_CORE, "visionaccel-digits-vlm", *sorted(plugins))):
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
    problems = [problem for text in found.requires or () if (problem := _problem(found, text))]
    if not any(problem.status == "failure" for problem in problems):
        yield Finding(name, "pass", found.version)
    yield from problems


def _problem(needing: Distribution, text: str) -> Finding | None:
    """Check one requirement of a distribution. For an extra, only a version that does not fit is a problem."""
    name, needs = f"{needing.name} {needing.version}", text.partition(";")[0].strip()
    try:
        requirement = Requirement(text)
        found = installed(requirement.name)
        extras = ("", *(needing.metadata.get_all("Provides-Extra") or ()))
        needed_by = [
            extra for extra in extras if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ]
        fits = "" not in needed_by if found is None else requirement.specifier.contains(found, prereleases=True)
    except (InvalidRequirement, InvalidVersion) as error:
        return Finding(needing.name, "warning", f"{name} requires {needs!r}, which cannot be read: {error}", "")
    if fits or requirement.url is not None or not needed_by:
        return None
    state = "it is not installed" if found is None else f"{found} is installed"
    fix = f"pip install {shlex.quote(f'{requirement.name}{requirement.specifier}')}"
    if "" in needed_by:
        return Finding(needing.name, "failure", f"{name} needs {needs}, but {state}", fix)
    return Finding(needing.name, "warning", f"an extra of {name} needs {needs}, but {state}", fix)


def of_settings(registry: Registry | None) -> Iterator[Finding]:
    """Check the environment's settings, and that the backends they name are installed if a registry is given."""
    for variable, near in unknown_variables().items():
        fix = f"Did you mean {near}?" if near else "Unset it, or see the table of settings."
        yield Finding(variable, "warning", "not a setting, so it is ignored", fix)
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
        fix = "Set it to a backend, such as torch_ref."
        yield Finding(f"{PREFIX}FALLBACK", "failure", f"{AUTO!r} is not allowed for a fallback", fix)
    if settings.bundle is not None and not settings.bundle.is_dir():
        fix = "Run `visionaccel pull`, or correct the path."
        yield Finding(f"{PREFIX}BUNDLE", "failure", f"{settings.bundle} is not a folder", fix)


def of_source(
    source: str, backend: str | None, devices: Collection[str], installed: Collection[str]
) -> Iterator[Finding]:
    """Check a bundle and read all of its files, or check a checkpoint. The first finding is that it opens.

    Args:
        source: Its folder, or the Hugging Face repository of a checkpoint.
        backend: The backend that will run it, if one is chosen.
        devices: The devices that it will run on, if any are chosen.
        installed: Names of the installed backends.
    """
    if not is_bundle(source):
        tower = open_tower(source)
        yield Finding("checkpoint", "pass", f"{source}, family {tower.family}")
        yield _model(tower)
        return
    bundle = open_bundle(source, trust_unchanged=False)
    names = [program.name for program in bundle.manifest.programs]
    programs = f"{len(names)} {'program' if len(names) == 1 else 'programs'}: {', '.join(names)}"
    yield Finding("manifest", "pass", f"{source}, family {bundle.family}, {programs}")
    yield _model(bundle.tower)
    sizes = {file.path: file.bytes for file in bundle.manifest.every_file()}
    yield Finding("digests", "pass", f"{len(sizes)} files of {sum(sizes.values()) / 2**20:.1f} MiB match")
    certificate = bundle.manifest.certificate
    if certificate is None:
        yield Finding("certificate", "warning", "none: the programs were not compared with the reference", _PROVE)
    else:
        yield from _certificate(certificate)
        yield _ran_on(certificate, backend, devices, installed)
    if images := read_golden(bundle):
        yield Finding("golden images", "pass", f"{len(images)}, which a canary encodes before the first request")
    else:
        yield Finding("golden images", "warning", "none, so no canary can run", _PROVE)


def _model(tower: Tower) -> Finding:
    model = model_of(tower)
    fix = "" if model.modes else "Use the encoder from Python, or add a row: see docs/adding-a-family.md."
    return passed_unless(fix, "model", model.in_vllm)


def _certificate(found: Certificate) -> Iterator[Finding]:
    failed = [each.program for each in found.programs if each.failure is not None]
    if not found.passed:
        detail = f"not passed on {found.created}: {', '.join(failed) or 'its answers differ'}"
        yield Finding("certificate", "failure", detail, "Do not serve it. Export or import it again, and validate it.")
    else:
        lowest = min(each.lowest_cosine for each in found.programs)
        yield Finding("certificate", "pass", f"passed on {found.created}, lowest cosine {lowest:.6f}")
    if not found.independent:
        detail = "visionaccel's own tower in float32, because transformers has none: it would not show a wrong family"
        yield Finding("certificate's reference", "warning", detail, "Compare embeddings with the model's own code.")


def _ran_on(found: Certificate, backend: str | None, devices: Collection[str], installed: Collection[str]) -> Finding:
    """Check whether the certificate was made with the backend and kind of device that will run the programs."""
    places = list(dict.fromkeys((each.backend, each.device, each.simulated) for each in found.programs))
    detail = "made on " + "; ".join(f"{maker}, {device}{' (SIMULATED)' * sim}" for maker, device, sim in places)
    makers, kinds = {maker for maker, _, _ in places}, {_kind(device) for _, device, _ in places}
    fix = f"Run `visionaccel validate` {'here' if backend is None else f'with `--backend {backend}`'}."
    if backend is not None and makers != {backend}:
        detail += f"; {backend} will run it"
    elif devices and kinds != set(map(_kind, devices)):
        detail += f"; {', '.join(devices)} will run it"
    elif not makers <= set(installed):
        detail += ", which is not installed here"
    elif any(simulated for _, _, simulated in places):
        detail, fix = f"{detail}, which is not hardware", "Validate it on the hardware too."
    else:
        fix = ""
    return passed_unless(fix, "certificate's device", detail)


def _kind(device: str) -> str:
    return device.partition(":")[0].strip().casefold()
