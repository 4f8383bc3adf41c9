"""Contenders on the same grids in one run: each in a separate process, all warm, in turns and never at once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from visionaccel.core.comparison import Comparison
from visionaccel.core.grid import Grid
from visionaccel.core.orphans import temporary_folder
from visionaccel.errors import DeviceError
from visionaccel.families import Tower
from visionaccel_bench.encode.contender_process import ContenderProcess
from visionaccel_bench.encode.contenders import REFERENCE, Contender, absence

TABLE = tuple(Grid.parse(text) for text in ("16x16", "16x32", "32x32", "32x64", "64x64", "64x128", "128x128"))
"""From 256 to 16,384 patches, each twice as many as the one before."""

Progress = Callable[[str], None]

_MOST_ROWS = 4096
"""Products of more rows are no faster."""

_PAUSE = 0.3
"""Seconds before each turn: threads of the process before may spin for that long."""


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
    """How far the embeddings of tokens are from transformers' in float32.

    `relative_error` is the norm of the difference over the norm of the reference.
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
    """One contender's measurements on the grids that it came to.

    Attributes:
        opened: `device`, `precision`, `about`, `simulated`, as it said when it was open.
        startup_seconds: From the start of its process to its first embedding.
        resident_bytes: Its memory when it was last asked.
        peak_bytes: The most that it had.
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

    `error` says why there are none, or no more.
    """

    rates: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def measure_encodes(
    source: Path, tower: Tower, contenders: Sequence[Contender], plan: EncodePlan, tell: Progress
) -> tuple[list[Taken], Peak, str | None]:
    """Measure every contender; each that fails has its error. `source` is the folder that they open, `tower` its tower.

    The reference encodes each grid once even if it is not among the contenders, and is not timed then.

    Returns:
        What each contender did, the machine's peak, and why the reference did not encode if it did not.
    """
    taken = [Taken(contender, error=absence(contender)) for contender in contenders]
    with ExitStack() as stack:
        run = _Run(source, tower, plan, tell, stack)
        for each in taken:
            run.start(each)
        reference = next((each for each in taken if each.contender.label == REFERENCE.label), None)
        if not run.entrants:
            return taken, run.peak, None if reference is None else reference.error
        if reference is None:
            reference = Taken(REFERENCE, error=absence(REFERENCE))
            run.start(reference, timed=False)
        run.start_products()
        for grid in plan.grids:
            run.on_grid(grid)
        failed = (on_grid.error for on_grid in reference.grids.values() if on_grid.error is not None)
        return taken, run.peak, reference.error or next(failed, None)


@dataclass(slots=True)
class _Entrant:
    taken: Taken
    process: ContenderProcess
    timed: bool

    @property
    def label(self) -> str:
        return self.taken.contender.label


class _Run:
    """The processes of a run, and whose turn it is. `entrants` are the contenders that were opened."""

    def __init__(self, source: Path, tower: Tower, plan: EncodePlan, tell: Progress, stack: ExitStack) -> None:
        self._source, self._tower, self._plan, self._tell, self._stack = source, tower, plan, tell, stack
        self._folder = stack.enter_context(temporary_folder("visionaccel-bench-"))
        self._products: ContenderProcess | None = None
        self.entrants: list[_Entrant] = []
        self.peak = Peak()
        self._patches(plan.grids[0])  # not within the first contender's time to start

    def start(self, taken: Taken, *, timed: bool = True) -> None:
        """Open a contender and let it encode the first grid."""
        if taken.error is not None:
            return
        label, first = taken.contender.label, self._plan.grids[0]
        self._tell(f"{label}: starting")
        with _error_of(taken):
            process = self._process(label, taken.contender.python)
            try:
                taken.opened = process.open(taken.contender, self._source, self._plan.threads, self._plan.deadline)
            except DeviceError:
                process.close()
                raise
            entrant = _Entrant(taken, process, timed)
            answer = self._warm_up(entrant, first)
            if not process.alive:
                taken.error = taken.grids.pop(first).error
                return
            if answer is not None:  # one that fails may take the other grids
                taken.startup_seconds = answer["ended"] - process.started
            self.entrants.append(entrant)

    def start_products(self) -> None:
        """Start what measures the machine."""
        with _error_of(self.peak):
            self._products = self._process("products", None)

    def on_grid(self, grid: Grid) -> None:
        """Warm every contender up on a grid, compare the embeddings, and measure in turns."""
        self._products_turn(grid)
        if grid != self._plan.grids[0]:  # for the first one, the start was the warm-up
            for entrant in self.entrants:
                self._warm_up(entrant, grid)
        self._compare(grid)
        for number in range(self._plan.rounds):
            self._products_turn(grid)
            for entrant in self.entrants:
                if entrant.timed:
                    self._turn(entrant, grid, f"{number + 1} of {self._plan.rounds}")
        self._patches(grid).unlink()

    def _warm_up(self, entrant: _Entrant, grid: Grid) -> dict[str, Any] | None:
        entrant.taken.grids[grid] = OnGrid()
        return self._encode(entrant, grid, "warming up", at_least=0.0, save=str(self._embeddings(entrant.label)))

    def _turn(self, entrant: _Entrant, grid: Grid, number: str) -> None:
        found = entrant.taken.grids[grid]
        if found.error is None:
            time.sleep(_PAUSE)
        answer = self._encode(entrant, grid, number, at_least=self._plan.turn_seconds)
        if answer is not None:
            found.rounds.append(answer["seconds"])
            found.processor_seconds += answer["processor_seconds"]

    def _encode(
        self, entrant: _Entrant, grid: Grid, what: str, *, at_least: float, save: str | None = None
    ) -> dict[str, Any] | None:
        """The contender's answer; None if it failed on this grid, or its process has ended."""
        taken, found = entrant.taken, entrant.taken.grids[grid]
        if found.error is None and not entrant.process.alive:
            found.error = "its process ended on an earlier grid."
        if found.error is not None:
            return None
        self._tell(f"{grid}: {entrant.label}, {what}")
        patches = str(self._patches(grid))
        request = {"do": "encode", "patches": patches, "grid": list(grid.thw), "at_least": at_least, "save": save}
        with _error_of(found):
            answer = entrant.process.ask(request, self._plan.deadline)
            taken.resident_bytes, taken.peak_bytes = answer["resident_bytes"], answer["peak_bytes"]
            return answer
        return None

    def _compare(self, grid: Grid) -> None:
        # A process that ended while it encoded leaves a part of its file.
        whole = any(
            entrant.label == REFERENCE.label and entrant.taken.grids[grid].error is None for entrant in self.entrants
        )
        reference = np.load(self._embeddings(REFERENCE.label)) if whole else None
        for entrant in self.entrants:
            file, found = self._embeddings(entrant.label), entrant.taken.grids[grid]
            if reference is None or found.error is not None or not file.exists():
                continue
            ours = np.load(file)
            if ours.shape != reference.shape:
                found.error = f"it returned shape {list(ours.shape)} instead of {list(reference.shape)}."
                continue
            compared = Comparison()
            compared.add(ours, reference)
            found.accuracy = Accuracy(compared.lowest, compared.mean, compared.relative_error, compared.nonfinite_rows)
        for entrant in self.entrants:
            self._embeddings(entrant.label).unlink(missing_ok=True)

    def _products_turn(self, grid: Grid) -> None:
        if self._products is None or self.peak.error is not None:
            return
        operations = self._tower.operations([grid])
        products = (*operations.linears, *operations.merger)
        shapes = list(dict.fromkeys((min(each.rows, _MOST_ROWS), each.inner, each.columns) for each in products))
        time.sleep(_PAUSE)
        with _error_of(self.peak):
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

    def _embeddings(self, label: str) -> Path:
        return self._folder / f"embeddings-{_file_name(label)}.npy"

    def _process(self, label: str, python: str | None) -> ContenderProcess:
        log = self._folder / f"{_file_name(label)}.log"
        return self._stack.enter_context(ContenderProcess(log, self._plan.threads, python))


@contextmanager
def _error_of(place: Taken | OnGrid | Peak) -> Iterator[None]:
    """Note what fails where it belongs, and go on."""
    try:
        yield
    except DeviceError as error:
        place.error = str(error)


def _file_name(label: str) -> str:
    return hashlib.sha256(label.encode()).hexdigest()[:16]
