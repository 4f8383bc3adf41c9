"""Finds and loads the runtime of a model: AMD's FlexMLRT library, or the simulator with OpenVINO.

The package can be imported on any machine. Its compiled modules are imported when a program is opened, after a check
for everything that they need.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Self

from visionaccel.backends import Rejected
from visionaccel.errors import ConfigurationError

NPU, SIMULATOR = "npu", "simulator"
_LIBRARY = "libflexmlrt.so"
_SCRIPT = "FLEXMLRT_SIMULATOR_SCRIPT"
_SCRIPT_LOCK = Lock()
"""The environment variable is shared by the whole process, so only one script at a time is active."""

_PLACES = (("FLEXMLRT_LIB_DIR", ""), ("FLEXMLRT_ROOT", "lib"), ("RYZEN_AI_INSTALLATION_PATH", "deployment/lib"))
"""Environment variables with the location of AMD's software, and the folder of the library below each."""

_VERSION = re.compile(r"^VERSION\s*=\s*[\"']([^\"']+)[\"']", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class AmdEnvironment:
    """Where AMD's software is, by the environment variables of the backend's process.

    Attributes:
        folders: The folders to search for the library, in this order.
        xrt_ini: XRT's settings (`XRT_INI_PATH`); None if not set.
    """

    folders: tuple[Path, ...] = ()
    xrt_ini: Path | None = None

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Self:
        """Read environment variables; an empty variable counts as unset."""
        named = [Path(variables[name], below) for name, below in _PLACES if variables.get(name)]
        linked = [Path(folder) for folder in variables.get("LD_LIBRARY_PATH", "").split(":") if folder]
        ini = variables.get("XRT_INI_PATH")
        return cls((*named, *linked), Path(ini) if ini else None)

    def library(self) -> Path | None:
        """AMD's library; None if it is in none of the folders."""
        return next((folder / _LIBRARY for folder in self.folders if (folder / _LIBRARY).is_file()), None)


def missing(device: str, amd: AmdEnvironment) -> Rejected | None:
    """Return what this machine lacks to run on a device; None if nothing. Loads nothing."""
    if device == SIMULATOR:
        return _missing_for_simulator()
    if find_spec("visionaccel_flexmlrt._sdk") is None:
        return Rejected(
            "this build of visionaccel-flexmlrt was made without AMD's FlexMLRT SDK.",
            "Build it with the SDK, as its README says: FLEXMLRT_ROOT=/path/to/flexmlrt pip install ./plugins/flexmlrt",
        )
    if amd.library() is None:
        searched = ", ".join(dict.fromkeys(map(str, amd.folders))) or "no folder, since none of them is set"
        return Rejected(
            f"{_LIBRARY} was not found in the folders of FLEXMLRT_LIB_DIR, FLEXMLRT_ROOT, "
            f"RYZEN_AI_INSTALLATION_PATH and LD_LIBRARY_PATH ({searched}).",
            "Install AMD's Ryzen AI Software and set RYZEN_AI_INSTALLATION_PATH.",
        )
    return None


def load(device: str, amd: AmdEnvironment, *, any_version: bool = False) -> ModuleType:
    """Return the compiled module for a device; `any_version` accepts a library of another version than its build's.

    Raises:
        ConfigurationError: If something is missing, or the library cannot be loaded or has a different version.
    """
    lacking = missing(device, amd)
    if lacking is not None:
        raise ConfigurationError(lacking.reason, hint=lacking.hint)
    if device == SIMULATOR:
        module = importlib.import_module("visionaccel_flexmlrt._simulator")
        module.use_openvino(str(openvino_library()))
        return module
    library = amd.library()
    assert library is not None
    try:
        # Once loaded by its path, the module finds it by its name, not by the linker's search path.
        ctypes.CDLL(str(library))
        module = importlib.import_module("visionaccel_flexmlrt._sdk")
    except (ImportError, OSError) as error:
        raise ConfigurationError(
            f"{library} cannot be loaded: {error}",
            hint="Install XRT and the rest of Ryzen AI Software; `visionaccel doctor` lists what is missing.",
        ) from error
    built, found = module.sdk_version, library_version(library)
    if found is not None and built not in ("unknown", found) and not any_version:
        # The layout of the SDK's structures may differ.
        raise ConfigurationError(
            f"visionaccel-flexmlrt was built with FlexMLRT {built}, but {library} belongs to {found}.",
            hint=f"Build it again with the SDK of {found}, or pass the option any_version=true at your own risk.",
        )
    return module


@contextmanager
def simulator_faults(script: Path | None) -> Iterator[None]:
    """Set the environment variable with the simulator's faults within this context; None leaves it unchanged.

    A context with a script waits for those of other threads.
    """
    if script is None:
        yield
        return
    with _SCRIPT_LOCK:
        before = os.environ.get(_SCRIPT)
        os.environ[_SCRIPT] = str(script)
        try:
            yield
        finally:
            os.environ.pop(_SCRIPT, None)
            if before is not None:
                os.environ[_SCRIPT] = before


def library_version(library: Path) -> str | None:
    """Return the version of a library's SDK, from the `__init__.py` of a folder above it; None if unknown."""
    for folder in library.resolve().parents[:3]:
        file = folder / "__init__.py"
        if file.is_file():
            found = _VERSION.search(file.read_text(encoding="utf-8", errors="replace"))
            if found is not None:
                return found[1]
    return None


def sdk_version(device: str, module: ModuleType, amd: AmdEnvironment) -> str | None:
    """Return the version of a device's SDK: the library's, or else the one that the module was built with, if known."""
    if device == SIMULATOR:
        return "1.7"  # the simulator has its interface
    library = amd.library()
    built = str(module.sdk_version)
    return (library_version(library) if library is not None else None) or (None if built == "unknown" else built)


def openvino_library() -> Path | None:
    """OpenVINO's C library in the installed package `openvino`; None if it is not installed."""
    spec = find_spec("openvino")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for library in sorted(Path(folder, "libs").glob("libopenvino_c.so*")):
            return library
    return None


def _missing_for_simulator() -> Rejected | None:
    if find_spec("visionaccel_flexmlrt._simulator") is None:
        return Rejected(
            "this build of visionaccel-flexmlrt has no simulator: it was built without OpenVINO's headers.",
            "Build it in an environment with openvino.",
        )
    if openvino_library() is None:
        return Rejected(
            "the simulator computes with OpenVINO, which is not installed.",
            "Install it: pip install 'visionaccel-flexmlrt[simulator]'.",
        )
    return None
