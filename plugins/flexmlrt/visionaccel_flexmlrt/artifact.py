"""Checks compiled artifacts without the SDK, so that a wrong file is refused with a clear message."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from visionaccel.core.bounded_files import open_regular
from visionaccel.core.program import Program
from visionaccel.errors import ArtifactError
from visionaccel_flexmlrt.runtime import NPU, SIMULATOR

FLEXMLRT_RAI = "flexmlrt.rai"
"""A single file that AMD's Vitis AI compiler wrote for FlexMLRT."""

FLEXMLRT_DIRECTORY = "flexmlrt.directory"
"""A partition's folder in the cache of AMD's Vitis AI compiler; the artifact is its `partition-info.json`."""

SIMULATOR_MAGIC = b"VASIMRAI"
"""The first bytes of an artifact for the FlexMLRT simulator."""

SIMULATOR_FILE = "simulator.rai"
"""The name of such an artifact in the folder of a partition (`FLEXMLRT_DIRECTORY`)."""

logger = logging.getLogger(__name__)

_AGAIN = "Fetch the artifact again."
_LFS_POINTER = b"version https://git-lfs"
_SMALLEST_REAL = 1 << 20


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled artifact.

    Attributes:
        path: The path to pass to the SDK: the `.rai` file, or the folder of the partition.
        single_file: Whether it is a `.rai` file.
        simulated: Whether it was made for the simulator.
    """

    path: Path
    single_file: bool
    simulated: bool

    @classmethod
    def of(cls, program: Program) -> Artifact:
        """Return the artifact of a program; ArtifactError if it is missing, empty or a Git LFS pointer."""
        if program.artifact is None:
            raise ArtifactError(f"program {program.name!r} has no file.", hint=_AGAIN)
        single_file = program.format == FLEXMLRT_RAI
        folder = program.artifact.parent
        binary = program.artifact if single_file else folder / SIMULATOR_FILE
        if not single_file and not binary.is_file():
            return cls(folder, single_file, simulated=False)
        return cls(binary if single_file else folder, single_file, made_for_simulator(binary))

    @property
    def device(self) -> str:
        """The device that it was made for: `npu` or `simulator`."""
        return SIMULATOR if self.simulated else NPU

    @property
    def suspicious(self) -> bool:
        """Whether it is smaller than any known compiled encoder."""
        return self.single_file and not self.simulated and self.path.stat().st_size < _SMALLEST_REAL


def made_for_simulator(binary: Path, failure: type[ArtifactError] = ArtifactError) -> bool:
    """Return whether a compiled file was made for the simulator, by its first bytes.

    Raises:
        ArtifactError: As `failure`, if the file cannot be read, is empty or is a Git LFS pointer.
    """
    try:
        with open_regular(binary) as file:
            head = file.read(len(_LFS_POINTER))
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise failure(f"{binary} cannot be read: {error}", hint=_AGAIN) from error
    if head.startswith(_LFS_POINTER):
        raise failure(
            f"{binary} is a Git LFS pointer of {size} bytes, not the artifact.",
            hint="Run `git lfs pull` in the clone, and import the artifact again.",
        )
    if size == 0:
        raise failure(f"{binary} is empty.", hint=_AGAIN)
    return head.startswith(SIMULATOR_MAGIC)


def open_settings(artifact: Artifact, sdk_version: str | None) -> Mapping[str, str]:
    """Return the SDK's names of device and subgraph for an artifact; empty if none may be passed.

    As public callers do: a folder is opened as subgraph "0", a `.rai` file as "vaiml_par_0" on "stx" before SDK 1.8,
    and without names since.
    """
    if not artifact.single_file:
        return {"device_name": "stx", "subgraph": "0"}
    if sdk_version is None:
        logger.warning(
            "The FlexMLRT SDK does not report its version, so it is used like one before 1.8: device 'stx', subgraph "
            "'vaiml_par_0'. Set the options device_name and subgraph if that fails."
        )
    numbers = tuple(int(part) for part in re.findall(r"\d+", sdk_version or "")[:2])
    if numbers >= (1, 8):
        return {"device_name": "", "subgraph": ""}
    return {"device_name": "stx", "subgraph": "vaiml_par_0"}
