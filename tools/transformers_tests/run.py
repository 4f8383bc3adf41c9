"""Runs transformers' tests of models with an encoder in the place of their vision towers.

`python tools/transformers_tests/run.py CHECKOUT` needs a checkout of transformers' repository, of the release that is
installed, and distributions that its tests import, such as `parameterized` and `datasets`. `make transformers-tests`
installs them in a separate folder.

Every generation, modelling and pipeline test of a family is run, except those that `left_out.toml` lists with a reason.
A test passes only if our encoder made all embeddings of its images and videos. Tests that fail are run again with
transformers' own towers, to see whether the encoder is the cause.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from outcomes import FAILED, Row, report, verdict

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
BACKENDS = ("onnxrt", "torch_ref")
LEFT_OUT = Path(__file__).with_name("left_out.toml")


def run(
    checkout: Path, family: str, backend: str | None, only: Sequence[str] = (), *, every: bool = False
) -> list[Row]:
    """Run tests of a family in a process; return their rows.

    Args:
        checkout: The checkout of transformers.
        family: The model's folder in it.
        backend: The encoder's backend; None for transformers' own towers.
        only: The tests to run, as `Class::name`; all if empty.
        every: Whether to run the tests that are left out too.
    """
    file = f"tests/models/{family}/test_modeling_{family}.py"
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="visionaccel-") as folder:
        results = Path(folder, "results.json")
        # The installed transformers is tested: the checkout's conftest.py would put its sources first.
        command = [sys.executable, "-m", "pytest", *(f"{file}::{test}" for test in only), *([] if only else [file])]
        command += ["-c", os.devnull, f"--rootdir={checkout}", "--noconftest", "-p", "no:cacheprovider", "--quiet"]
        command += [f"--basetemp={folder}/pytest", "-W", "ignore", "--tb=short", "-p", "replaced_tower"]
        command += ["--tower-family", family, "--tower-results", str(results)]
        command += [] if backend is None else ["--tower-backend", backend]
        command += [] if every else ["--tower-left-out", str(LEFT_OUT)]
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        if not results.exists():
            raise SystemExit(f"pytest did not run the tests of {family}; see above.")
        return [Row(**row) for row in json.loads(results.read_text())]


def compared(checkout: Path, rows: Sequence[Row]) -> list[Row]:
    """Run the tests that failed again with transformers' own towers; return all rows, with both outcomes."""
    failed = [row.test for row in rows if verdict(row) == FAILED]
    if not failed:
        return list(rows)
    own = {row.test: row.outcome for row in run(checkout, rows[0].family, None, failed, every=True)}
    return [replace(row, own_tower=own.get(row.test, "")) for row in rows]


def version_of(checkout: Path) -> str:
    """Return the version of transformers in a checkout."""
    found = re.search(r'^__version__ = "(.+)"', (checkout / "src/transformers/__init__.py").read_text(), re.MULTILINE)
    return found[1] if found else "of an unknown version"


def main() -> int:
    """Run each family with each backend; return 1 if a test fails only with our encoder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of transformers' repository")
    parser.add_argument("--family", nargs="+", default=FAMILIES, help="folders in tests/models (default: all three)")
    parser.add_argument("--backend", nargs="+", default=BACKENDS, help="backends; `none` keeps the models' towers")
    parser.add_argument("--every", action="store_true", help="run the tests that are left out too")
    given = parser.parse_args()
    checkout = given.checkout.resolve()
    installed, other = version("transformers"), version_of(checkout)
    if other != installed:
        print(f"The checkout is of transformers {other}, but {installed} is installed, so tests may fail.")
    worst = 0
    for name in given.backend:
        backend = None if name == "none" else name
        rows: list[Row] = []
        for family in given.family:
            found = run(checkout, family, backend, every=given.every)
            rows += compared(checkout, found) if backend else found
        print(f"\ntransformers {installed}, {backend or 'its own towers'}\n\n{report(rows)}\n", flush=True)
        worst |= any(verdict(row) == FAILED for row in rows)
    return worst


if __name__ == "__main__":
    sys.exit(main())
