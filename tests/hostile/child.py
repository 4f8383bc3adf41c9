"""The process that reads hostile input: `python -m hostile.child JOB`, where JOB is the JSON of a `Job`.

Each case is announced before it is read, so that the parent knows which one the process died of. A case that takes too
long ends the process, whoever holds the interpreter's lock; one that takes too much memory cannot have it.
"""

import faulthandler
import importlib
import json
import resource
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from hostile.kinds import Changed, Files, Kind
from visionaccel.errors import VisionAccelError

_PATIENCE = 4
"""By how much more the clock may advance."""


@dataclass(frozen=True)
class Job:
    """What a process is to do.

    Attributes:
        seeds: Folder of the seeds.
        work: Folder of this process, which does not exist yet.
        kinds: Module that holds the kinds, as `KINDS`.
        cases: Number of cases by name of kind; with crafted ones among them.
        crafted: Kinds of which the crafted cases come first.
        seed: Of what is random.
        seconds: Most of the processor's time that a case may take.
        memory: Bytes of address space that reading may take beyond what the process has before.
    """

    seeds: str
    work: str
    kinds: str
    cases: dict[str, int]
    crafted: list[str]
    seed: int
    seconds: float
    memory: int

    def packed(self) -> str:
        """As the process's argument."""
        return json.dumps(asdict(self))


def main() -> None:
    """Read every case, and tell of each."""
    job = Job(**json.loads(sys.argv[1]))
    kinds: dict[str, Kind] = importlib.import_module(job.kinds).KINDS
    shutil.copytree(job.seeds, job.work)
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # tells where, then the signal ends the process
    for name, count in job.cases.items():
        Cases(kinds[name], job).run(count)


def tell(**what: object) -> None:
    """Tell the parent."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Cases:
    """The cases of one kind in this process."""

    def __init__(self, kind: Kind, job: Job) -> None:
        self._kind, self._job = kind, job
        self._folder = Path(job.work, kind.base)
        self._done = 0

    def run(self, count: int) -> None:
        """Read the whole input, then so many hostile ones."""
        kind = self._kind
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        tell(kind=kind.name, whole=" ".join(filter(None, self._outcome(kind.whole))))
        before = _memory("VmRSS")
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + self._job.memory, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        if kind.name in self._job.crafted:
            for files in kind.crafted(self._folder):
                self._read(files)
        round_ = 0
        while self._done < count:
            self._read_random(count - self._done, self._job.seed + round_)
            round_ += 1
        tell(kind=kind.name, peak=_memory("VmHWM") - before)

    def _read_random(self, count: int, number: int) -> None:
        @seed(number)
        @settings(
            max_examples=count, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(self._kind.inputs(self._folder))
        def check(files: Files) -> None:
            self._read(files)

        check()

    def _read(self, files: Files) -> None:
        self._done += 1
        tell(kind=self._kind.name, begin=self._done)
        started = time.process_time()
        outcome, detail = self._outcome(files)
        tell(outcome=outcome, detail=detail, seconds=time.process_time() - started)
        if outcome not in ("read", "refused"):
            self._keep(files)

    def _outcome(self, files: Files) -> tuple[str, str]:
        with Changed(self._folder, files):
            # Time of the processor, which a busy machine does not change; and much more of the clock's, for what waits.
            signal.setitimer(signal.ITIMER_PROF, self._job.seconds)
            faulthandler.dump_traceback_later(_PATIENCE * self._job.seconds, exit=True)
            try:
                self._kind.read(self._folder)
            except VisionAccelError as error:
                str(error)
                return "refused", type(error).__name__
            except MemoryError:
                return "out of memory", traceback.format_exc(limit=-6)
            except Exception:
                return "foreign error", traceback.format_exc(limit=-6)
            finally:
                faulthandler.cancel_dump_traceback_later()
                signal.setitimer(signal.ITIMER_PROF, 0)
            return "read", ""

    def _keep(self, files: Files) -> None:
        for name, data in files.items():
            path = Path(self._job.work, "findings", f"{self._done}", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"missing" if data is None else data)


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


if __name__ == "__main__":
    main()
