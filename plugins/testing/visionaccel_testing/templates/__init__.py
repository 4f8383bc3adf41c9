"""Writes new projects: a backend's plug-in, complete and installable, with the conformance suite as its test."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from types import MappingProxyType

from visionaccel import __version__
from visionaccel.backends import Registry
from visionaccel.errors import ConfigurationError

__all__ = ["write_backend_project"]

_PLACES: Mapping[str, str] = MappingProxyType(
    {
        "pyproject.toml.txt": "pyproject.toml",
        "README.md.txt": "README.md",
        "gitignore.txt": ".gitignore",
        "package/__init__.py.txt": "visionaccel_$name/__init__.py",
        "package/py.typed": "visionaccel_$name/py.typed",
        "test_conformance.py.txt": "tests/test_conformance.py",
        "workflows/test.yml.txt": ".github/workflows/test.yml",
    }
)
"""The path of each file of the template. Until they are filled in, the files are only text, so they end in .txt."""


def write_backend_project(name: str, folder: Path) -> tuple[Path, ...]:
    """Write the project of a new backend, and return the files.

    Args:
        name: The backend's name, such as `acme_npu`: lower-case letters, digits and underscores.
        folder: The folder to write to; it must not exist, or be empty.

    Raises:
        ConfigurationError: If the name is invalid or that of an installed backend, or the folder is not empty.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ConfigurationError(
            f"{name!r} is not a valid backend name.",
            hint="Use lower-case letters, digits and single underscores, such as acme_npu.",
        )
    if name in {entry.name for entry in Registry().entries}:
        raise ConfigurationError(f"a backend named {name!r} is already installed.", hint="Choose a different name.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and is not an empty folder.", hint="Choose a different folder.")
    words = name.split("_")
    major, minor, *_ = __version__.split(".")
    filled = {
        "name": name,
        "distribution": f"visionaccel-{'-'.join(words)}",
        "class_name": "".join(word.capitalize() for word in words),
        "core": f">={major}.{minor},<{major}.{int(minor) + 1}",
    }
    template = files(__package__).joinpath("backend")
    written = []
    for stored, place in _PLACES.items():
        path = folder / Template(place).substitute(filled)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(template.joinpath(stored).read_text()).substitute(filled))
        written.append(path)
    return tuple(written)
