"""The distributions of this repository, and checks of what their archives contain."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from pathlib import Path, PurePosixPath

__all__ = ["DISTRIBUTIONS", "Distribution", "differences", "sdist_problems", "wheel_problems"]

_UNWANTED = re.compile(r"(^|/)(tests?|__pycache__|build|\.[a-z]\w*_cache)/|\.py[co]$|(^|/)conftest\.py$")
"""Tests, compiled files and caches."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """One distribution of this repository.

    Attributes:
        folder: The folder of its pyproject.toml, relative to the repository's root.
        package: The folder of its package, relative to that folder.
        sources: Other files in that folder that its source distribution needs to build.
        compiled: Whether its wheel has compiled modules.
        called: Its name for installation, if it differs from the package's.
    """

    folder: str
    package: str
    sources: tuple[str, ...] = ()
    compiled: bool = False
    called: str = ""

    @property
    def module(self) -> str:
        """The package's name."""
        return PurePosixPath(self.package).name

    @property
    def name(self) -> str:
        """The name that it is installed by."""
        return self.called or self.module.replace("_", "-")

    def project(self, root: Path) -> dict:
        """Return its pyproject.toml, parsed."""
        return tomllib.loads((root / self.folder / "pyproject.toml").read_text())


DISTRIBUTIONS = (
    Distribution(".", "src/visionaccel", ("hatch_build.py",)),
    Distribution("plugins/onnxrt", "visionaccel_onnxrt"),
    Distribution("plugins/openvino", "visionaccel_openvino"),
    Distribution("plugins/torch_ref", "visionaccel_torch_ref"),
    Distribution("plugins/flexmlrt", "visionaccel_flexmlrt", ("cpp/CMakeLists.txt", "cpp/bridge/module.cpp"), True),
    Distribution("plugins/testing", "visionaccel_testing"),
    Distribution("plugins/bench", "visionaccel_bench"),
    # conformance is measured with this model, in addition to small towers
    Distribution("examples/digits_vlm", "digits_vlm", called="visionaccel-digits-vlm"),
)


def wheel_problems(wheel: Path, distribution: Distribution, sources: Iterable[str]) -> list[str]:
    """Return a description of each problem of a wheel.

    Args:
        wheel: The archive.
        distribution: The distribution that it should contain.
        sources: The files of the package in the repository, relative to the folder that holds the package.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = _metadata(archive.read, names, "METADATA")
    information = {name for name in names if ".dist-info/" in name}
    package, wanted = names - information, set(sources)
    modules = {name for name in package if name.endswith(".so")}
    problems = [f"{name} is missing" for name in sorted(wanted - package)]
    problems += [f"{name} is not wanted" for name in sorted(package - wanted - modules)]
    problems += [f"{name} is not part of the package" for name in sorted(names) if _UNWANTED.search(name)]
    if bool(modules) != distribution.compiled:
        problems.append(f"compiled modules: {sorted(modules) or 'none'}")
    if f"{distribution.module}/py.typed" not in names:
        problems.append("py.typed is missing")
    if not any(name.endswith("/licenses/LICENSE") for name in information):
        problems.append("the licence is missing")
    return [*problems, *_metadata_problems(metadata, distribution)]


def sdist_problems(sdist: Path, distribution: Distribution, sources: Iterable[str]) -> list[str]:
    """Return a description of each problem of a source distribution; takes the arguments of `wheel_problems`."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
        contents = {member.name.partition("/")[2]: member for member in members}
        text = archive.extractfile(contents["PKG-INFO"]).read().decode()
    parent = PurePosixPath(distribution.package).parent
    wanted = {"LICENSE", "README.md", "pyproject.toml", *distribution.sources}
    wanted |= {str(parent / name) for name in sources}
    problems = [f"{name} is missing" for name in sorted(wanted - set(contents))]
    problems += [f"{name} is a link" for name, member in sorted(contents.items()) if member.issym() or member.islnk()]
    top = {name.partition("/")[0] for name in wanted} | {"PKG-INFO", ".gitignore"}
    problems += [f"{name} is not wanted" for name in sorted(contents) if name.partition("/")[0] not in top]
    return [*problems, *_metadata_problems(message_from_string(text), distribution)]


def differences(one: Path, other: Path) -> list[str]:
    """Return the differences of two wheels in file names, and in the contents of files that are not compiled."""
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
        names, others = set(first.namelist()), set(second.namelist())
        found = [f"{name} is only in one of them" for name in sorted(names ^ others)]
        for name in sorted(names & others):
            if not name.endswith((".so", "/RECORD")) and first.read(name) != second.read(name):
                found.append(f"{name} differs")
    return found


def _metadata(read, names: Iterable[str], file: str) -> Message:
    (name,) = (name for name in names if name.endswith(f".dist-info/{file}"))
    return message_from_string(read(name).decode())


def _metadata_problems(metadata: Message, distribution: Distribution) -> list[str]:
    problems = []
    if metadata["Name"] != distribution.name:
        problems.append(f"it is named {metadata['Name']}")
    if metadata["License-Expression"] != "Apache-2.0":
        problems.append(f"its licence is {metadata['License-Expression']}")
    if metadata["Description-Content-Type"] != "text/markdown" or distribution.name not in metadata.get_payload():
        problems.append("it has no description")
    problems += [f"{line} refers to a local file" for line in metadata.get_all("Requires-Dist") if "file:" in line]
    return problems
