"""Runs hostile input in child processes, several at once, and says what became of each case."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hostile.child import Job

SECONDS = 5.0
MEMORY = 3 * 2**29
_MOST_DEATHS = 5
"""Of processes with one kind, after which its other cases are left out."""


@dataclass
class Account:
    """What became of the cases of one kind.

    Attributes:
        wanted: How many there were to be.
        whole: What became of the input that is not hostile.
        cases: How many there were.
        outcomes: How many were read, by `read`, and how many were refused, by the error's name.
        peak: Most bytes of memory beyond what its process had before.
        slowest: Seconds of the slowest case.
        seconds: Of all cases together.
        findings: What must not be.
        ended: Whether a process came to the end of them.
    """

    wanted: int
    whole: str = ""
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)
    ended: bool = False


def run(
    seeds: Path,
    work: Path,
    cases: Mapping[str, int],
    *,
    kinds: str = "hostile.every_kind",
    workers: int = 2,
    seed: int = 0,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> dict[str, Account]:
    """Read hostile input.

    Args:
        seeds: Folder of the seeds.
        work: Where the processes work, and where the files of findings stay.
        cases: Number of cases by kind.
        kinds: Module that holds the kinds.
        workers: Processes at once.
        seed: Of what is random.
        seconds: Most of the processor's time that a case may take.
        memory: Bytes of address space that a case may take.

    Returns:
        What became of them, by kind.
    """
    accounts = {name: Account(count) for name, count in cases.items()}
    names = list(cases)
    # Several kinds to a process, since one takes seconds to start; more groups than workers, since they differ.
    groups = [names[first :: 2 * workers] for first in range(2 * workers)]

    def make_job(wanted: Mapping[str, int], deaths: Counter[str]) -> Job:
        place = Path(tempfile.mkdtemp(prefix="worker-", dir=work)) / "files"
        crafted = [name for name in wanted if not deaths[name]]
        return Job(
            str(seeds), str(place), kinds, dict(wanted), crafted, seed + 1000 * deaths.total(), seconds, memory
        )  # fmt: skip

    def work_off() -> None:
        while groups:
            try:
                group = groups.pop(0)
            except IndexError:  # another worker took it
                return
            deaths: Counter[str] = Counter()
            while wanted := {
                name: max(1, accounts[name].wanted - accounts[name].cases)
                for name in group
                if not accounts[name].ended and deaths[name] < _MOST_DEATHS
            }:
                died = _run_job(make_job(wanted, deaths), accounts)
                if died is not None:
                    deaths[died] += 1

    threads = [threading.Thread(target=work_off) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return accounts


def _run_job(job: Job, accounts: Mapping[str, Account]) -> str | None:
    """Run one process; the kind that it died of."""
    place = Path(job.work)
    errors = place.parent / "stderr"
    begun, current = "", next(iter(job.cases))
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "hostile.child", job.packed()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **_surroundings(place.parent)},
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:  # what native code prints
                continue
            if isinstance(said, dict):
                current = str(said.get("kind", current))
                begun = _note(said, accounts[current], begun, place)
    status = process.returncode
    if status == 0 and all(accounts[name].ended for name in job.cases):
        if not (place / "findings").exists():
            shutil.rmtree(place.parent)
        return None
    tail = "\n".join(errors.read_text(errors="replace").splitlines()[-25:])
    how = "hang" if status == -signal.SIGPROF or "Timeout (" in tail else f"death with status {status}"
    accounts[current].findings.append(f"{how} in case {begun or 'none'}; files in {place}\n{tail}")
    return current


def _note(said: Mapping[str, object], account: Account, begun: str, place: Path) -> str:
    if "begin" in said:
        account.cases += 1
        return str(said["begin"])
    if "whole" in said:
        account.whole = str(said["whole"])
    elif "peak" in said:
        account.peak, account.ended = max(account.peak, int(str(said["peak"]))), True
    elif "outcome" in said:
        taken = float(str(said["seconds"]))
        account.seconds += taken
        account.slowest = max(account.slowest, taken)
        outcome, detail = str(said["outcome"]), str(said["detail"])
        if outcome in ("read", "refused"):
            account.outcomes[detail or outcome] += 1
        else:
            account.findings.append(f"{outcome}; files in {place}/findings/{begun}\n{detail}")
    return begun


def _surroundings(place: Path) -> dict[str, str]:
    """No network, no second thread where one would do, nothing remembered from elsewhere."""
    return {
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def table(accounts: Mapping[str, Account]) -> str:
    """The accounts as a text."""
    lines = [
        f"{'kind':24}{'whole':>9}{'cases':>7}{'read':>7}{'s':>7}{'slowest':>9}{'MiB':>7}{'findings':>10}  refused by"
    ]
    for name, account in accounts.items():
        refused = ", ".join(f"{kind} {n}" for kind, n in account.outcomes.most_common() if kind != "read")
        lines.append(
            f"{name:24}{account.whole:>9}{account.cases:7}{account.outcomes['read']:7}{account.seconds:7.1f}{account.slowest:9.2f}"
            f"{account.peak / 2**20:7.0f}{len(account.findings):10}  {refused}"
        )
    return "\n".join(lines)


def shares(total: int, kinds: Mapping[str, int]) -> dict[str, int]:
    """Cases by kind: at least so many in all, in the proportion of the kinds' shares."""
    whole = sum(kinds.values())
    return {name: -(-share * total // whole) for name, share in kinds.items()}


def findings(accounts: Mapping[str, Account]) -> Sequence[str]:
    """What must not be."""
    return [f"{name}: {finding}" for name, account in accounts.items() for finding in account.findings]


def elapsed(since: float) -> str:
    """Seconds since a time."""
    return f"{time.monotonic() - since:.0f} s"
