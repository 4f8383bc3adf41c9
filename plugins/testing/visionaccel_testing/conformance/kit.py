"""What checks work with: the backend on generated towers, in this process or another, and the reference's answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from visionaccel.backends import Registry
from visionaccel.checkpoint import SINGLE_FILE
from visionaccel.core.arrays import as_numpy
from visionaccel.core.comparison import Comparison
from visionaccel.core.grid import Grid, total_patches
from visionaccel.core.program import AnyGrid, FixedGrid
from visionaccel.encoder import Encoder, WantedIsolation, open_encoder
from visionaccel.errors import BackendUnavailableError
from visionaccel.validation import REFERENCE_BACKEND, open_reference
from visionaccel_testing.checkpoints import LIVELY, TINY, random_checkpoint
from visionaccel_testing.conformance.check import CheckFailedError
from visionaccel_testing.conformance.declaration import BackendUnderTest

Embeddings = NDArray[np.float32]
Weights = dict[str, NDArray[Any]]
F = TypeVar("F", bound=Callable[..., None])

PATCH_WIDTH = TINY["in_channels"] * TINY["temporal_patch_size"] * TINY["patch_size"] ** 2
"""Values in a patch of the kit's small towers."""

WINDOW_SIDE = TINY["window_size"] // TINY["patch_size"]
"""Patches along a side of their attention windows."""

_ANY = (
    (Grid(1, 16, 12),),  # whole windows and partial ones
    (Grid(1, 2, 2),),  # a single token
    (Grid(1, 10, 22), Grid(1, 22, 10)),  # partial windows on both sides
    (Grid(3, 6, 4), Grid(1, 4, 18)),  # a video with an image
    (Grid(1, 24, 24),),
)
"""Calls that show faults in windows, frames and neighbours, for programs that take any grid."""

_SIDES = (2, 4, 6, 8, 10, 12, 16, 20, 24, 32)
_EXAMPLES = 12
"""Examples that a property is tried with."""


@dataclass(frozen=True)
class Subject:
    """A backend under test, and what it opens. It can be sent to another process.

    Attributes:
        source: What it opens: the checkpoint, or a bundle made from it.
        checkpoint: The float32 checkpoint.
        seed: Seed of generated patches and grids.
    """

    backend: str
    device: str | None
    options: Mapping[str, Any]
    isolation: WantedIsolation
    source: Path
    checkpoint: Path
    seed: int

    def open(self, *, isolation: WantedIsolation | None = None, deadline: float = 20.0) -> Encoder:
        """Return a new encoder, which the caller closes; by default with the subject's isolation."""
        return open_encoder(
            self.source,
            backend=self.backend,
            device=self.device,
            options=self.options,
            registry=Registry(),
            isolation=isolation or self.isolation,
            deadline=deadline,
        )


def listed(grids: Sequence[Grid]) -> str:
    """Return the grids as text for a message."""
    return ", ".join(map(str, grids))


def patches_for(grids: Sequence[Grid], seed: int, width: int = PATCH_WIDTH) -> NDArray[np.float32]:
    """Return random float32 patches [P, width]; the same for the same grids and seed."""
    key = [seed, *(size for grid in grids for size in grid.thw)]
    return np.random.default_rng(key).standard_normal((total_patches(grids), width), dtype=np.float32)


def grids_of(encoder: Encoder) -> tuple[tuple[Grid, ...], ...]:
    """Return the calls that an encoder's programs take: one or several grids each."""
    coverages = encoder.coverages

    def taken(grid: Grid) -> bool:
        return any(encoder.tower.fits(coverage, grid.frame) for coverage in coverages)

    if any(isinstance(coverage, AnyGrid) for coverage in coverages):
        return tuple(call for call in _ANY if all(map(taken, call)))
    fixed = [coverage.grid for coverage in coverages if isinstance(coverage, FixedGrid)]
    within = [grid for h in _SIDES for w in _SIDES if taken(grid := Grid(1, h, w)) and grid not in fixed]
    # Of the many grids in a bucket, some of each size.
    chosen = [*fixed, *within[:: max(1, len(within) // 6)]]
    calls: list[tuple[Grid, ...]] = [(grid,) for grid in chosen]
    return (*calls, (chosen[0], chosen[-1]), (Grid(2, chosen[0].h, chosen[0].w),))


def encoded(encoder: Encoder, patches: NDArray[Any], grids: Sequence[Grid]) -> Embeddings:
    """Return the embeddings as a new array on the host; an encoder may return tensors of any device."""
    return np.array(as_numpy(encoder.encode(patches, grids)))


def first_call(encoder: Encoder, seed: int) -> Callable[[], Embeddings]:
    """Return a function that encodes the first of the encoder's calls."""
    grids = grids_of(encoder)[0]
    patches = patches_for(grids, seed)
    return lambda: encoded(encoder, patches, grids)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: small models are slower on several, by many times on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Kit:
    """One backend under test, and an empty folder to work in.

    Attributes:
        seed: Seed of the weights, patches and grids.
        figures: What the running check measured.
    """

    def __init__(self, declared: BackendUnderTest, folder: Path, seed: int = 0) -> None:
        self.declared, self.seed = declared, seed
        self.figures: dict[str, float] = {}
        self._folder = folder
        self._open = ExitStack()

    def close(self) -> None:
        """Close the encoders that the kit opened."""
        self._open.close()

    @cached_property
    def subject(self) -> Subject:
        """The backend on a small tower with every trait of the released ones."""
        return self.subject_of("tiny")

    @cached_property
    def encoder(self) -> Encoder:
        """The subject, open; checks must leave it as it is."""
        return self._open.enter_context(self.subject.open())

    @cached_property
    def reference(self) -> Encoder:
        """The float32 reference on the same weights."""
        return self.reference_of(self.subject.checkpoint)

    @cached_property
    def calls(self) -> tuple[tuple[Grid, ...], ...]:
        """Calls that the encoder takes, chosen to show faults."""
        return grids_of(self.encoder)

    def subject_of(
        self,
        name: str,
        config: Mapping[str, Any] | None = None,
        edit: Callable[[Weights], None] | None = None,
        family: str = "qwen2_5_vl",
    ) -> Subject:
        """Return the backend on a tower of random weights, made once per name.

        Args:
            name: A folder's name.
            config: The tower's configuration; by default the family's in `TINY_TOWERS`.
            edit: Changes the weights first.
            family: The tower's family.
        """
        checkpoint = self._folder / name / "checkpoint"
        if not checkpoint.exists():
            random_checkpoint(checkpoint, config, family=family, seed=self.seed, scales=LIVELY)
            if edit is not None:
                file = checkpoint / SINGLE_FILE
                weights = load_file(file)
                edit(weights)
                save_file(weights, file)
        return self.subject_on(checkpoint, self._folder / name / "source")

    def subject_on(self, checkpoint: Path, place: Path) -> Subject:
        """Return the backend on a checkpoint, or on what the declared source makes of it in `place`, once."""
        declared, source = self.declared, checkpoint
        if declared.source is not None:
            source = place if place.exists() else declared.source(checkpoint, place)
        return Subject(
            declared.backend, declared.device, declared.options, declared.isolation, source, checkpoint, self.seed
        )

    def work(self, name: str) -> Path:
        """Return a new empty folder of that name."""
        place = self._folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def copy_of(self, subject: Subject, name: str) -> Subject:
        """Return the same backend on a copy of its files, which a check may damage."""
        place = self.work(name)
        checkpoint = Path(shutil.copytree(subject.checkpoint, place / "checkpoint"))
        return self.subject_on(checkpoint, place / "source")

    def reference_of(self, checkpoint: Path) -> Encoder:
        """Return the float32 reference on a checkpoint; BackendUnavailableError if it is not installed."""
        registry = Registry()
        if find_spec("transformers") is None or REFERENCE_BACKEND not in {entry.name for entry in registry.entries}:
            raise BackendUnavailableError(
                "the conformance kit compares with the reference, which is not installed.",
                hint="pip install 'visionaccel[testing]'.",
            )
        encoder, _ = open_reference(checkpoint, registry)
        return self._open.enter_context(encoder)

    def patches(self, grids: Sequence[Grid], number: int = 0) -> NDArray[np.float32]:
        """Return random patches for grids, different for each number."""
        return patches_for(grids, self.seed * 1000 + number)

    def encode(self, patches: NDArray[Any], grids: Sequence[Grid]) -> Embeddings:
        """Return the backend's embeddings, as a new array."""
        return encoded(self.encoder, patches, grids)

    def expected(
        self, patches: NDArray[np.float32], grids: Sequence[Grid], reference: Encoder | None = None
    ) -> Embeddings:
        """Return the embeddings of a reference, by default that of the subject, as a new array."""
        with one_thread():
            return encoded(reference or self.reference, patches, grids)

    def check(self, grids: Sequence[Grid], what: str, number: int = 0) -> None:
        """Fail unless the backend's embeddings of random patches are within the tolerance of the reference's."""
        patches = self.patches(grids, number)
        self.compare(self.encode(patches, grids), self.expected(patches, grids), what)

    def compare(self, found: Embeddings, exact: Embeddings, what: str, by: Encoder | None = None) -> None:
        """Fail unless embeddings are within the tolerance of the exact ones.

        Args:
            found: float32 [tokens, out_width].
            exact: The same from the reference, or from another call.
            what: What they are, for the message.
            by: The backend's encoder that returned them, by default that of the subject.
        """
        encoder = by or self.encoder
        if found.shape != exact.shape:
            raise CheckFailedError(f"{what}: {list(found.shape)} embeddings instead of {list(exact.shape)}.")
        comparison = Comparison(encoder.tower.spec.out)
        comparison.add(found, exact)
        wanted = self.declared.tolerance(encoder.capabilities.precision)
        figures = (
            ("lowest cosine", comparison.lowest, wanted.lowest),
            ("first percentile of cosines", comparison.first_percentile, wanted.first_percentile),
            ("mean cosine", comparison.mean, wanted.mean),
        )
        for name, figure, least in figures:
            if not figure >= least:
                raise CheckFailedError(
                    f"{what}: {name} {figure:.6f}, not {least:.6f}; the worst of {len(found)} tokens is "
                    f"{comparison.lowest_at}."
                )
        if not comparison.relative_error <= wanted.relative_error:
            raise CheckFailedError(
                f"{what}: relative error {comparison.relative_error:.2e}, over {wanted.relative_error:.1e}, "
                "at good cosines: embeddings are too long or too short, or less exact than the precision promises."
            )

    def same(self, found: Embeddings, other: Embeddings, what: str) -> None:
        """Fail unless two answers to one call agree: to the bit if the session says that it is deterministic."""
        if found.shape != other.shape:
            raise CheckFailedError(f"{what}: {list(found.shape)} embeddings, then {list(other.shape)}.")
        if not self.encoder.capabilities.deterministic:
            self.compare(found, other, what)
        elif not np.array_equal(found, other):
            rows = int((found != other).any(axis=1).sum())
            raise CheckFailedError(
                f"{what}: {rows} of {len(found)} embeddings differ in some bits, by up to "
                f"{float(np.abs(found - other).max()):.1e}. If the backend is not deterministic, declare "
                "deterministic=False in its Capabilities."
            )

    def grid_lists(self, least: int = 1, most: int = 3) -> st.SearchStrategy[tuple[Grid, ...]]:
        """Generate lists of grids that the encoder takes, often with equal ones, which may share a session's call."""
        if any(isinstance(opened.program.coverage, AnyGrid) for opened in self.encoder.programs):
            side = st.integers(1, 11).map(lambda half: 2 * half)
            grid = st.builds(Grid, st.integers(1, 3), side, side)
        else:
            grid = st.sampled_from(sorted({grid for call in self.calls for grid in call}))
        return st.lists(grid, min_size=1, max_size=2).flatmap(
            lambda pool: st.lists(st.sampled_from(pool), min_size=least, max_size=most).map(tuple)
        )

    def holds(self, *strategies: st.SearchStrategy[Any]) -> Callable[[F], None]:
        """Decorator: try a property at once on generated examples; the smallest that fails is reported."""

        def try_it(function: F) -> None:
            tried = settings(
                max_examples=_EXAMPLES,
                deadline=None,
                database=None,
                print_blob=False,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
                derandomize=False,
            )(given(*strategies)(function))
            seed(self.seed)(tried)()

        return try_it
