"""Checks what a Ryzen AI machine needs for FlexMLRT, without using the device."""

from __future__ import annotations

import configparser
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from visionaccel.backends import Finding
from visionaccel.core.program import Program
from visionaccel.errors import ArtifactError
from visionaccel_flexmlrt.artifact import Artifact
from visionaccel_flexmlrt.runtime import NPU, SIMULATOR, AmdEnvironment, library_version, missing

_ROOT = Path("/")
_AMD = "0x1022"
_NPUS: Mapping[tuple[str, str], tuple[str, bool]] = {
    ("0x1502", "*"): ("Phoenix or Hawk Point", False),
    ("0x17f0", "0x00"): ("Strix", True),
    ("0x17f0", "0x10"): ("Strix", True),
    ("0x17f0", "0x11"): ("Strix", True),
    ("0x17f0", "0x20"): ("Krackan", True),
}
"""Name of each NPU by PCI device and revision, and whether it computes in bfloat16."""

_Found: TypeAlias = tuple[Literal["pass", "warning", "failure"], str, str]
"""Status and detail of a finding, and how to fix a problem."""

_KERNEL = (6, 10)
_SHORT_TIMEOUT = 10
_HEAP_PAGES = 8


def check_machine(amd: AmdEnvironment, root: Path = _ROOT, kernel: str | None = None) -> Sequence[Finding]:
    """Check this machine; a check that fails with an error becomes a warning.

    Args:
        amd: Where AMD's software is.
        root: The folder with `/sys`, `/dev` and `/opt`.
        kernel: The kernel's release; None for the running one.
    """
    checks: Mapping[str, Callable[[], _Found]] = {
        "NPU on the PCI bus": lambda: _npu(root),
        "kernel": lambda: _kernel(kernel or platform.release()),
        "amdxdna module": lambda: _driver(root),
        "amdxdna timeout": lambda: _timeout(root),
        "device node": lambda: _node(root),
        "XRT": lambda: _xrt(root),
        "XRT heap": lambda: _heap(amd.xrt_ini),
        "FlexMLRT library": lambda: _library(amd),
        "simulator": lambda: _simulator(amd),
    }
    return [Finding(name, *_made(check)) for name, check in checks.items()]


def check_artifacts(programs: Iterable[Program]) -> Sequence[Finding]:
    """Check that artifacts are real: not missing, empty, Git LFS pointers or suspiciously small."""
    found = []
    for program in programs:
        try:
            artifact = Artifact.of(program)
        except ArtifactError as error:
            found.append(Finding(f"artifact {program.name}", "failure", error.message, error.hint or ""))
            continue
        if artifact.suspicious:
            detail = f"{artifact.path} has only {artifact.path.stat().st_size} bytes"
            fix = "Compare its size with the original's; a Git LFS file that was not fetched is this small."
            found.append(Finding(f"artifact {program.name}", "warning", detail, fix))
            continue
        made_for = "the SIMULATOR" if artifact.simulated else "the NPU"
        found.append(Finding(f"artifact {program.name}", "pass", f"{artifact.path}, made for {made_for}"))
    return found


def _made(check: Callable[[], _Found]) -> _Found:
    try:
        return check()
    except Exception as error:  # broken machines are to be expected here
        return "warning", f"{type(error).__name__}: {error}", "Check it manually."


def _npu(root: Path) -> _Found:
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, kind, revision = (_read(device / field) for field in ("vendor", "device", "revision"))
        if vendor != _AMD or kind not in {known for known, _ in _NPUS}:
            continue
        model, computes = _NPUS.get((kind, revision)) or _NPUS.get((kind, "*")) or ("an unknown revision", True)
        detail = f"{model} at {device.name} (1022:{kind[2:]} rev {revision[2:]})"
        if computes:
            return "pass", detail, ""
        return "failure", f"{detail}, which has no bfloat16", "Use a machine with Strix or Krackan."
    return "failure", "none was found", "Use a Ryzen AI machine, and enable the NPU (IPU) in its firmware setup."


def _kernel(release: str) -> _Found:
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if numbers >= _KERNEL:
        return "pass", release, ""
    wanted = ".".join(map(str, _KERNEL))
    return "failure", release, f"Boot Linux {wanted} or later, such as Ubuntu 24.04 with its HWE kernel."


def _driver(root: Path) -> _Found:
    if (root / "sys/module/amdxdna").is_dir():
        return "pass", "loaded", ""
    return "failure", "not loaded", "Install the XDNA driver (xrt_plugin-amdxdna) and run: modprobe amdxdna"


def _timeout(root: Path) -> _Found:
    value = _read(root / "sys/module/amdxdna/parameters/timeout_in_sec")
    fix = (
        "For encodes of seconds, put into /etc/modprobe.d/amdxdna.conf: options amdxdna timeout_in_sec=120, and reboot."
    )
    if not value:
        return "warning", "timeout_in_sec cannot be read", fix
    seconds = int(value)
    if 0 < seconds < _SHORT_TIMEOUT:
        return "warning", f"{seconds} s; a longer run is aborted and can leave zeros behind", fix
    return "pass", f"{seconds} s" if seconds else "none", ""


def _node(root: Path) -> _Found:
    nodes = sorted((root / "dev/accel").glob("accel*"))
    if not nodes:
        return "failure", "/dev/accel/accel0 is missing", "Load amdxdna; see dmesg for why it has none."
    if not os.access(nodes[0], os.R_OK | os.W_OK):
        return "failure", f"no permission to open {nodes[0]}", "Add the user to the group render, and log in again."
    return "pass", str(nodes[0]), ""


def _xrt(root: Path) -> _Found:
    installed = root / "opt/xilinx/xrt/bin/xrt-smi"
    found = shutil.which("xrt-smi") or (str(installed) if installed.exists() else None)
    if found is None:
        fix = "Install XRT from Ryzen AI Software, and run: source /opt/xilinx/xrt/setup.sh"
        return "failure", "xrt-smi was not found", fix
    return "pass", f"{found}; `xrt-smi examine` lists the NPU", ""


def _heap(path: Path | None) -> _Found:
    fix = f"Set XRT_INI_PATH to a file with the lines [Debug] and num_heap_pages={_HEAP_PAGES}."
    lacking = "without it a large model fails with DRM_IOCTL_AMDXDNA_CREATE_BO: Invalid argument"
    if path is None:
        return "failure", f"XRT_INI_PATH is not set; {lacking}", fix
    parser = configparser.ConfigParser()
    try:
        if not parser.read(path):
            return "failure", f"XRT_INI_PATH={path} cannot be read; {lacking}", fix
        pages = parser.getint("Debug", "num_heap_pages", fallback=0)
    except (configparser.Error, ValueError) as error:
        return "failure", f"XRT_INI_PATH={path} cannot be understood: {error}", fix
    if pages < _HEAP_PAGES:
        return "failure", f"num_heap_pages is {pages or 'not set'} in {path}; {lacking}", fix
    return "pass", f"num_heap_pages={pages} in {path}", ""


def _library(amd: AmdEnvironment) -> _Found:
    lacking, library = missing(NPU, amd), amd.library()
    if lacking is not None:
        return "failure", lacking.reason, lacking.hint
    assert library is not None, "else it is missing"
    return "pass", f"{library}, version {library_version(library) or 'unknown'}", ""


def _simulator(amd: AmdEnvironment) -> _Found:
    lacking = missing(SIMULATOR, amd)
    if lacking is None:
        return "pass", "available as device 'simulator'; it is not an NPU", ""
    return "warning", lacking.reason, lacking.hint


def _read(path: Path) -> str:
    try:
        return path.read_text().strip().lower()
    except OSError:
        return ""
