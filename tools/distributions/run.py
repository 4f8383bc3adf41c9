"""Builds the distributions into dist/ and checks them: `python tools/distributions/run.py TWINE`.

TWINE is the path of the command `twine`.

They are built from a copy of the files that git tracks or would add, so that no other file gets in. These must hold:

1. their metadata pass `twine check --strict`;
2. wheels and source distributions contain all required files and no others;
3. each source distribution builds the same wheel again;
4. the wheels, installed into a fresh virtual environment, list their backends, import, and compute in the simulator.
   Their dependencies come last on that environment's path, from the environment that runs this.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from contents import DISTRIBUTIONS, Distribution, differences, sdist_problems, wheel_problems

ROOT = Path(__file__).parents[2]
_BUILD = "import importlib, sys; getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(sys.argv[3])"
_IMPORT = "import importlib, sys; print(*(importlib.import_module(name).__file__ for name in sys.argv[1:]), sep='\\n')"


class DistributionError(Exception):
    """A distribution does not pass the checks."""


def call(command: Sequence[str | Path], *, cwd: Path = ROOT) -> str:
    """Run a command and return what it prints; DistributionError with its whole output if it fails."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        command, cwd=cwd, env={**kept, "PLAIN_EXTRAS": "1", "NO_COLOR": "1"}, capture_output=True, text=True
    )
    if run.returncode != 0:
        raise DistributionError(f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}")
    return run.stdout


def copy_tree(target: Path) -> list[str]:
    """Copy the repository's files, as a clone has them; return their names."""
    listed = call(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    names = [name for name in listed.split("\0") if name and (ROOT / name).exists()]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name, follow_symlinks=False)
    return names


def build(folder: Path, kind: str, output: Path, backend: str) -> Path:
    """Build a source distribution or a wheel, as a build front end does; return the archive."""
    before = set(output.glob("*"))
    call([sys.executable, "-c", _BUILD, backend, f"build_{kind}", output], cwd=folder)
    (made,) = set(output.glob("*")) - before
    return made


def built(distribution: Distribution, tree: Path, output: Path, again: Path) -> tuple[Path, Path]:
    """Build a source distribution and a wheel, and check that the source distribution builds the same wheel."""
    backend = distribution.project(tree)["build-system"]["build-backend"]
    sdist = build(tree / distribution.folder, "sdist", output, backend)
    wheel = build(tree / distribution.folder, "wheel", output, backend)
    with tarfile.open(sdist) as archive:
        archive.extractall(again, filter="data")
    other = build(again / sdist.name.removesuffix(".tar.gz"), "wheel", again, backend)
    if found := differences(wheel, other):
        raise DistributionError(f"{sdist.name} builds a different wheel: {'; '.join(found)}")
    return sdist, wheel


def files_of(distribution: Distribution, names: Sequence[str]) -> list[str]:
    """Return those of the repository's files that belong to a package, relative to the folder that holds it."""
    package = Path(distribution.folder, distribution.package)
    return [str(Path(name).relative_to(package.parent)) for name in names if Path(name).is_relative_to(package)]


def check_installed(output: Path, folder: Path) -> None:
    """Install the wheels into a fresh environment, without their dependencies, and use them there."""
    call([sys.executable, "-m", "venv", folder])
    python = folder / "bin" / "python"
    site = Path(call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    modules = [distribution.module for distribution in DISTRIBUTIONS]
    # --ignore-installed, because the dependencies on the path may include these distributions.
    names = [distribution.name for distribution in DISTRIBUTIONS]
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed", "--find-links", output]
    call([python, "-m", "pip", "install", *options, *names], cwd=folder)
    for module, file in zip(modules, call([python, "-c", _IMPORT, *modules], cwd=folder).split(), strict=True):
        if not Path(file).is_relative_to(site):
            raise DistributionError(f"{module} was imported from {file}, not from its wheel")
    rows = json.loads(call([folder / "bin" / "visionaccel", "backends", "--json"], cwd=folder))
    listed = {row["name"] for row in rows}
    if listed != (wanted := {"flexmlrt", "onnxrt", "openvino", "simulated", "torch_ref"}):
        raise DistributionError(f"`visionaccel backends` lists {sorted(listed)} and not {sorted(wanted)}")
    for words in (("bench", "encode"), ("demo",), ("init", "backend"), ("import-vitisai",)):
        call([folder / "bin" / "visionaccel", *words, "--help"], cwd=folder)
    print(call([python, ROOT / "tools" / "distributions" / "simulator_check.py"], cwd=folder).strip())


def main(twine: str) -> None:
    """Build and check each distribution; stop at the first that does not pass."""
    output = ROOT / "dist"
    output.mkdir(exist_ok=True)
    for old in [*output.glob("visionaccel*.whl"), *output.glob("visionaccel*.tar.gz")]:
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        tree, again = Path(folder, "tree"), Path(folder, "again")
        again.mkdir()
        names = copy_tree(tree)
        archives = []
        for distribution in DISTRIBUTIONS:
            sdist, wheel = built(distribution, tree, output, again)
            package = files_of(distribution, names)
            problems = [f"{wheel.name}: {problem}" for problem in wheel_problems(wheel, distribution, package)]
            problems += [f"{sdist.name}: {problem}" for problem in sdist_problems(sdist, distribution, package)]
            if problems:
                raise DistributionError("\n".join(problems))
            archives += [sdist, wheel]
            print(f"{sdist.name}, {wheel.name}", flush=True)
        print(call([twine, "check", "--strict", *archives]).strip())
        check_installed(output, Path(folder, "installed"))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except DistributionError as error:
        sys.exit(str(error))
