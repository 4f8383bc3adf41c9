"""Runs the fuzz targets, several at once, and says how each ended."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TARGETS: dict[str, int] = {
    "images": 4000, "manifests": 1500, "weights": 3000, "models": 1500, "contexts": 3000, "tables": 1500,
}  # fmt: skip
"""Runs of each target `fuzz_<name>.py`."""

_UNITS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_PEAK = re.compile(r"stat::peak_rss_mb:\s*(\d+)")


@dataclass(frozen=True)
class Fuzzed:
    """How a target ended.

    Attributes:
        runs: Inputs that were read.
        seconds: By the clock.
        peak: Most MiB of memory that its process had.
        finding: What must not be; empty if there is nothing.
    """

    runs: int
    seconds: float
    peak: int
    finding: str


def fuzz_all(work: Path, targets: Mapping[str, int], *, workers: int = 2) -> dict[str, Fuzzed]:
    """Run targets; inputs that a target ended with stay in `work`."""
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(targets, pool.map(lambda name: _fuzz(work, name, targets[name]), targets), strict=True))


def _fuzz(work: Path, name: str, runs: int) -> Fuzzed:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"hostile.fuzz_{name}", f"-runs={runs}", f"-artifact_prefix={work}/{name}-"],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = done.stdout + done.stderr
    units, peak = (int(found[1]) if (found := pattern.search(said)) else 0 for pattern in (_UNITS, _PEAK))
    failed = done.returncode or units < runs
    finding = f"status {done.returncode} after {units} runs:\n" + "\n".join(said.splitlines()[-40:]) if failed else ""
    return Fuzzed(units, time.monotonic() - started, peak, finding)


def fuzz_table(fuzzed: Mapping[str, Fuzzed]) -> str:
    """How they ended, as a text."""
    lines = [f"{'coverage-guided':24}{'runs':>16}{'s':>7}{'MiB':>16}{'findings':>10}"]
    for name, each in fuzzed.items():
        lines.append(f"{name:24}{each.runs:16}{each.seconds:7.1f}{each.peak:16}{bool(each.finding):10}")
    return "\n".join(lines)
