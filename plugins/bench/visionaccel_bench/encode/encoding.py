"""Contenders on the same grids in one run: each in a separate process, all warm, in turns and never at once."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from visionaccel.core.child_groups import ChildGroup, how_it_ended
from visionaccel.core.comparison import Comparison
from visionaccel.core.cores import process_cores
from visionaccel.core.grid import Grid
from visionaccel.core.orphans import temporary_folder
from visionaccel.errors import DeadlineError, DeviceError
from visionaccel.families import Tower
from visionaccel_bench.encode.contenders import BUNDLE, REFERENCE, Contender, absence
from visionaccel_bench.encode.operations import count_operations
from visionaccel_bench.server import log_end, quiet_environment

TABLE = tuple(Grid.parse(text) for text in ("16x16", "16x32", "32x32", "32x64", "64x64", "64x128", "128x128"))
"""From 256 to 16,384 patches, each twice as many as the previous one."""

Progress = Callable[[str], None]

_MAIN = "visionaccel_bench.encode.contender_main"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_GRACE = 2.0
"""Seconds that a closed process has to end by itself."""

_MOST_ROWS = 4096
"""Products of more rows are no faster."""

_PAUSE = 0.3
"""Seconds before each turn: threads of the previous process may spin for that long."""


@dataclass(frozen=True, slots=True)
class EncodePlan:
    """What each contender gets: grids in the order of measuring, turns on each, cores and threads.

    A turn is one encode, or as many as begin within `turn_seconds`. Opening, or a turn, may take `deadline` seconds.
    `seed` is that of the patches.
    """

    grids: tuple[Grid, ...]
    rounds: int
    threads: int
    turn_seconds: float = 0.25
    deadline: float = 600.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How far the embeddings of tokens are from those of transformers in float32.

    `relative_error` is the norm of the difference divided by the norm of the reference.
    """

    lowest_cosine: float
    mean_cosine: float
    relative_error: float
    nonfinite_rows: int


@dataclass(slots=True)
class OnGrid:
    """One contender on one grid: seconds of each encode, one list for each turn, and processor time of all of them.

    After an error it has no further turns.
    """

    rounds: list[list[float]] = field(default_factory=list)
    processor_seconds: float = 0.0
    accuracy: Accuracy | None = None
    error: str | None = None


@dataclass(slots=True)
class Taken:
    """One contender's measurements on the grids that it reached.

    Attributes:
        opened: Its `device`, `precision`, `about` and `simulated`.
        startup_seconds: From the start of its process to its first embedding.
        resident_bytes: Its memory after its last turn.
        peak_bytes: Its highest memory.
        error: Why it is not in the comparison; None if it is.
    """

    contender: Contender
    opened: Mapping[str, Any] = field(default_factory=dict)
    startup_seconds: float | None = None
    resident_bytes: int | None = None
    peak_bytes: int | None = None
    grids: dict[Grid, OnGrid] = field(default_factory=dict)
    error: str | None = None


@dataclass(slots=True)
class Peak:
    """The most operations a second, by dtype, that matrix products of the tower's shapes reached in the same rounds.

    `error` says why all times, or those of later rounds, are missing.
    """

    rates: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def measure_encodes(
    source: Path, tower: Tower, contenders: Sequence[Contender], plan: EncodePlan, tell: Progress
) -> tuple[list[Taken], Peak, str | None]:
    """Measure every contender; one that fails has an error. `source` is the folder that they open, `tower` its tower.

    The reference encodes each grid once even if it is not among the contenders; it is not timed then.

    Returns:
        The measurements of each contender, the machine's peak, and why the reference did not encode, or None.
    """
    taken = [Taken(contender, error=absence(contender)) for contender in contenders]
    with ExitStack() as stack:
        run = _Run(source, tower, plan, tell, stack)
        for each in taken:
            run.start(each)
        reference = next((each for each in taken if each.contender.label == REFERENCE.label), None)
        if not run.opened:
            return taken, run.peak, None if reference is None else reference.error
        if reference is None:
            reference = Taken(REFERENCE, error=absence(REFERENCE))
            run.start(reference)
        for grid in plan.grids:
            run.on_grid(grid, taken)
        failed = (on_grid.error for on_grid in reference.grids.values() if on_grid.error is not None)
        return taken, run.peak, reference.error or next(failed, None)


class ContenderProcess(AbstractContextManager["ContenderProcess"]):
    """A process for one contender, or for measuring the machine; it is idle between requests.

    Args:
        log: File for its output.
        threads: Threads of its pools, and cores that it may run on if that is fewer than the machine has.
        python: Its interpreter; None for this one.

    Attributes:
        started: When it was started, on the system's monotonic clock.
        alive: Whether it takes requests.
    """

    def __init__(self, log: Path, threads: int, python: str | None = None) -> None:
        self._log, self._killed = log, False
        self._connection, theirs = Pipe()
        own = {"VLLM_PLUGINS": "", "TMPDIR": str(log.parent)}  # what it leaves there is removed with the run's folder
        environment = quiet_environment(dict.fromkeys(_THREADS, str(threads)) | own)
        self.started = time.monotonic()
        self.alive = True
        with theirs, log.open("wb") as out:
            try:
                self._child = ChildGroup(
                    [python or sys.executable, "-m", _MAIN, str(os.getpid()), str(theirs.fileno())],
                    environment=environment,
                    output=out,
                    pass_fds=(theirs.fileno(),),
                )
            except OSError as error:
                raise DeviceError(f"{python} cannot be started: {error}.", hint="Check the interpreter.") from error
            if threads < len(process_cores()):
                # Some runtimes ignore the variables and count the cores; the process's threads inherit this.
                with suppress(OSError):
                    os.sched_setaffinity(self._child.pid, sorted(process_cores())[:threads])

    def open(self, contender: Contender, source: Path, threads: int, seconds: float) -> dict[str, Any]:
        """Open the contender's tower; return its `device`, `precision`, `about` and `simulated`. Raises as `ask`."""
        given = asdict(contender)
        given["options"] = {name: value for name, value in given["options"].items() if name not in ("python", BUNDLE)}
        source = contender.bundle or source
        request = {"do": "open", **given, "source": str(source), "threads": threads, "deadline": seconds}
        return self.ask(request, seconds)

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            DeviceError: If the process answers with an error, or dies; it is `alive` only in the first case.
            DeadlineError: If it did not answer in time and was ended.
        """
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            answered = self._connection.poll(seconds)
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes()) if answered else {}
        except (EOFError, OSError) as error:
            self.close()
            raise DeviceError(f"its process {self._ending()}. The end of its output: {log_end(self._log)}") from error
        if not answered:
            self.close()
            raise DeadlineError(f"it took longer than {seconds:g} s and was stopped.", hint="Pass a longer --deadline.")
        if "error" in answer:
            raise DeviceError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and the processes that it started."""
        if self.alive:
            self.alive = False
            self._connection.close()
            self._killed = not self._child.end(_GRACE)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ending(self) -> str:
        if self._killed:
            return "closed its connection, kept running, and was ended"
        status = self._child.status
        assert status is not None
        memory = " (the machine may have run out of memory)" if status == -signal.SIGKILL else ""
        return how_it_ended(status) + memory


class _Run:
    """The processes of a run; `opened` are the contenders whose towers were opened."""

    def __init__(self, source: Path, tower: Tower, plan: EncodePlan, tell: Progress, stack: ExitStack) -> None:
        self._source, self._tower, self._plan, self._tell, self._stack = source, tower, plan, tell, stack
        self._folder = stack.enter_context(temporary_folder("visionaccel-bench-"))
        self._processes: dict[str, ContenderProcess] = {}
        self._products: ContenderProcess | None = None
        self.opened: list[Taken] = []
        self.peak = Peak()
        self._patches(plan.grids[0])  # not within the first contender's time to start

    def start(self, taken: Taken) -> None:
        """Open a contender, unless it has an error already, and let it encode the first grid."""
        if taken.error is not None:
            return
        label, first = taken.contender.label, self._plan.grids[0]
        self._tell(f"{label}: starting")
        with _error_of(taken):
            process = self._processes[label] = self._process(label, taken.contender.python)
            try:
                taken.opened = process.open(taken.contender, self._source, self._plan.threads, self._plan.deadline)
            except DeviceError:
                process.close()
                raise
            answer = self._warm_up(taken, first)
            if not process.alive:
                taken.error = taken.grids.pop(first).error
                return
            if answer is not None:  # otherwise it may still encode other grids
                taken.startup_seconds = answer["ended"] - process.started
            self.opened.append(taken)

    def on_grid(self, grid: Grid, timed: Sequence[Taken]) -> None:
        """Warm every contender up on a grid, compare the embeddings, and measure those that are `timed` in turns."""
        self._products_turn(grid)
        if grid != self._plan.grids[0]:  # on the first one, the start was the warm-up
            for taken in self.opened:
                self._warm_up(taken, grid)
        self._compare(grid)
        for number in range(1, self._plan.rounds + 1):
            self._products_turn(grid)
            for taken in timed:
                if (found := taken.grids.get(grid)) is None:  # it was never opened
                    continue
                if found.error is None:
                    time.sleep(_PAUSE)
                turn = f"{number} of {self._plan.rounds}"
                answer = self._encode(taken, grid, turn, at_least=self._plan.turn_seconds)
                if answer is not None:
                    found.rounds.append(answer["seconds"])
                    found.processor_seconds += answer["processor_seconds"]
        self._patches(grid).unlink()

    def _warm_up(self, taken: Taken, grid: Grid) -> dict[str, Any] | None:
        taken.grids[grid] = OnGrid()
        return self._encode(taken, grid, "warming up", at_least=0.0, save=str(self._embeddings(taken.contender)))

    def _encode(
        self, taken: Taken, grid: Grid, what: str, *, at_least: float, save: str | None = None
    ) -> dict[str, Any] | None:
        """Return the contender's answer; None if it failed on this grid, or its process has ended."""
        label, found = taken.contender.label, taken.grids[grid]
        process = self._processes[label]
        if found.error is None and not process.alive:
            found.error = "its process ended on an earlier grid."
        if found.error is not None:
            return None
        self._tell(f"{grid}: {label}, {what}")
        patches = str(self._patches(grid))
        request = {"do": "encode", "patches": patches, "grid": list(grid.thw), "at_least": at_least, "save": save}
        with _error_of(found):
            answer = process.ask(request, self._plan.deadline)
            taken.resident_bytes, taken.peak_bytes = answer["resident_bytes"], answer["peak_bytes"]
            return answer
        return None

    def _compare(self, grid: Grid) -> None:
        # A process that ended while it encoded leaves an incomplete file.
        complete = [taken for taken in self.opened if taken.grids[grid].error is None]
        if any(taken.contender.label == REFERENCE.label for taken in complete):
            reference = np.load(self._embeddings(REFERENCE))
            for taken in complete:
                ours, found = np.load(self._embeddings(taken.contender)), taken.grids[grid]
                if ours.shape != reference.shape:
                    found.error = f"it returned shape {list(ours.shape)} instead of {list(reference.shape)}."
                    continue
                compared = Comparison(self._tower.spec.out)
                compared.add(ours, reference)
                found.accuracy = Accuracy(
                    compared.lowest, compared.mean, compared.relative_error, compared.nonfinite_rows
                )
        for taken in self.opened:
            self._embeddings(taken.contender).unlink(missing_ok=True)

    def _products_turn(self, grid: Grid) -> None:
        """Measure the machine, in a process that the first turn starts: after those of the contenders."""
        if self.peak.error is not None:
            return
        operations = count_operations(self._tower.spec, [grid])
        products = (*operations.linears, *operations.merger)
        shapes = list(dict.fromkeys((min(each.rows, _MOST_ROWS), each.inner, each.columns) for each in products))
        time.sleep(_PAUSE)
        with _error_of(self.peak):
            if self._products is None:
                self._products = self._process("products", None)
            request = {"do": "products", "shapes": shapes, "threads": self._plan.threads}
            answer = self._products.ask(request, self._plan.deadline)
            for dtype, rate in answer["rates"].items():
                self.peak.rates[dtype] = max(rate, self.peak.rates.get(dtype, 0.0))

    def _patches(self, grid: Grid) -> Path:
        file = self._folder / f"patches-{grid}.npy"
        if not file.exists():
            shape = grid.patches, self._tower.patch_width
            np.save(file, np.random.default_rng(self._plan.seed).standard_normal(shape, dtype=np.float32))
        return file

    def _embeddings(self, contender: Contender) -> Path:
        return self._folder / f"embeddings-{_file_name(contender.label)}.npy"

    def _process(self, label: str, python: str | None) -> ContenderProcess:
        log = self._folder / f"{_file_name(label)}.log"
        return self._stack.enter_context(ContenderProcess(log, self._plan.threads, python))


@contextmanager
def _error_of(place: Taken | OnGrid | Peak) -> Iterator[None]:
    """Note a failure where it belongs, and go on."""
    try:
        yield
    except DeviceError as error:
        place.error = str(error)


def _file_name(label: str) -> str:
    return hashlib.sha256(label.encode()).hexdigest()[:16]
