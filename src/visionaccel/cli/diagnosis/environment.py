"""The machine: Python, system, processor, memory, disk and cores."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from visionaccel.backends import Finding
from visionaccel.cli.diagnosis.findings import looked
from visionaccel.core.cache_folder import cache_home
from visionaccel.core.cores import choose_cores, process_cores, shown_cores
from visionaccel.core.cpu import flags_in, processor_name
from visionaccel.errors import SettingsError
from visionaccel.settings import load_settings

__all__ = ["of_environment"]

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
    """What is found of the machine; a look that cannot be made is a finding of its own.

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
    except SettingsError:  # the settings have a finding of their own
        wanted = None
    return Finding("cores", "pass", shown_cores(choose_cores(wanted).cores or process_cores()))


def _gib(amount: int) -> str:
    return f"{amount / _GIB:.1f} GiB"
