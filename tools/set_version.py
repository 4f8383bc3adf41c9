"""Sets the version of every distribution: `python tools/set_version.py 0.2.0`.

The version is `visionaccel.__version__`. The plug-ins are released with the core and have its version. Each repeats it
in its pyproject.toml, so that it can be built from its source distribution alone, and requires the core and the other
plug-ins in the same minor release. A test checks that all of these agree.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?")
DIGITS = "examples/digits_vlm/pyproject.toml"


def replace(path: Path, pattern: str, new: str, *, several: bool = False) -> None:
    """Replace the only match of a pattern in a file, or with `several` every match."""
    text, count = re.subn(pattern, new, path.read_text(), flags=re.MULTILINE)
    if count == 0 or (count > 1 and not several):
        raise SystemExit(f"{path}: found {count} places to write {new}")
    path.write_text(text)


def set_version(root: Path, version: str) -> None:
    """Write a version into the core's package and the other distributions' projects in a repository."""
    if VERSION.fullmatch(version) is None:
        raise SystemExit(f"{version} is not a version such as 0.2.0 or 0.2.0rc1")
    minor = ".".join(version.split(".")[:2])
    replace(root / "src/visionaccel/__init__.py", r'^__version__ = ".*"$', f'__version__ = "{version}"')
    replace(root / DIGITS, r'^version = ".*"$', f'version = "{version}"')
    for project in (root / "plugins").glob("*/pyproject.toml"):
        replace(project, r'^version = ".*"$', f'version = "{version}"')
        # A pre-release comes before its release, so `~=` with the release would exclude it.
        core = version if VERSION.fullmatch(version)[1] else f"{minor}.0"
        replace(project, r'"(visionaccel[a-z-]*)~=[^"]+"', rf'"\1~={core}"', several=True)


if __name__ == "__main__":
    set_version(ROOT, sys.argv[1])
