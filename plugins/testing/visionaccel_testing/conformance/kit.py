"""What checks work with: the backend open on generated programs, and the reference's answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from visionaccel.core.comparison import Comparison
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid
from visionaccel.encoder import Encoder, open_encoder
from visionaccel.errors import BackendUnavailableError
from visionaccel.validation import REFERENCE_BACKEND, REFERENCE_OPTIONS
from visionaccel_testing.checkpoints import LIVELY, TINY, random_checkpoint
from visionaccel_testing.conformance.check import CheckFailedError
from visionaccel_testing.conformance.declaration import BackendUnderTest
from visionaccel_testing.conformance.subject import Subject, encoded, grids_of, patches_for

Embeddings = NDArray[np.float32]
Weights = dict[str, NDArray[Any]]
F = TypeVar("F", bound=Callable[..., None])

_EXAMPLES = 12
"""Calls that a property is tried with."""


class Kit:
    """One backend under test, and an empty folder to work in.

    Attributes:
        seed: Of the weights, patches and grids.
        figures: What the running check measured.
    """

    def __init__(self, declared: BackendUnderTest, folder: Path, seed: int = 0) -> None:
        self.declared, self.seed = declared, seed
        self.figures: dict[str, float] = {}
        self._folder = folder
        self._open = ExitStack()

    def close(self) -> None:
        """Close the encoders that it opened."""
        self._open.close()

    @cached_property
    def subject(self) -> Subject:
        """The backend on a small tower with every trait of the released ones."""
        return self.subject_of("tiny")

    @cached_property
    def encoder(self) -> Encoder:
        """The subject, open; for checks that leave it as it is."""
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
        self, name: str, config: Mapping[str, Any] = TINY, edit: Callable[[Weights], None] | None = None
    ) -> Subject:
        """The backend on a tower of random weights, made once by that name; `edit` may change the weights first."""
        checkpoint = self._folder / name / "checkpoint"
        if not checkpoint.exists():
            random_checkpoint(checkpoint, config, seed=self.seed, scales=LIVELY)
            if edit is not None:
                file = checkpoint / SINGLE_FILE
                weights = load_file(file)
                edit(weights)
                save_file(weights, file)
        return self.subject_on(checkpoint, self._folder / name / "source")

    def subject_on(self, checkpoint: Path, place: Path) -> Subject:
        """The backend on a checkpoint; what it opens is made from that in `place`, once, where it is another folder."""
        declared, source = self.declared, checkpoint
        if declared.source is not None:
            source = place if place.exists() else declared.source(checkpoint, place)
        return Subject(
            declared.backend, declared.device, declared.options, declared.isolation, source, checkpoint, self.seed
        )

    def work(self, name: str) -> Path:
        """A new folder of that name to work in."""
        place = self._folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def copy_of(self, subject: Subject, name: str) -> Subject:
        """The same backend on a copy of its files, which a check may damage."""
        place = self.work(name)
        checkpoint = Path(shutil.copytree(subject.checkpoint, place / "checkpoint"))
        return self.subject_on(checkpoint, place / "source")

    def reference_of(self, checkpoint: Path) -> Encoder:
        """The float32 reference on a checkpoint; BackendUnavailableError if it is not installed."""
        registry = Registry()
        if find_spec("transformers") is None or REFERENCE_BACKEND not in {entry.name for entry in registry.entries}:
            raise BackendUnavailableError(
                "the conformance kit measures against the reference, which is not installed.",
                hint="pip install 'visionaccel[testing]'.",
            )
        encoder = open_encoder(
            checkpoint, backend=REFERENCE_BACKEND, options=REFERENCE_OPTIONS, registry=registry, isolation="none"
        )
        return self._open.enter_context(encoder)

    def patches(self, grids: Sequence[Grid], number: int = 0) -> NDArray[np.float32]:
        """Random patches of grids; another number gives others."""
        return patches_for(grids, self.seed * 1000 + number)

    def encode(self, patches: NDArray[Any], grids: Sequence[Grid]) -> Embeddings:
        """A copy of what the backend makes of patches."""
        return encoded(self.encoder, patches, grids)

    def expected(self, patches: NDArray[np.float32], grids: Sequence[Grid]) -> Embeddings:
        """What the reference makes of them."""
        return encoded(self.reference, patches, grids)

    def check(self, grids: Sequence[Grid], what: str, number: int = 0) -> None:
        """Fail unless random patches of grids give what the reference makes of them, within the tolerance."""
        patches = self.patches(grids, number)
        self.compare(self.encode(patches, grids), self.expected(patches, grids), what)

    def compare(self, found: Embeddings, exact: Embeddings, what: str) -> None:
        """Fail unless embeddings [tokens, width] are within the tolerance of the exact ones; `what` names them."""
        if found.shape != exact.shape:
            raise CheckFailedError(f"{what}: {list(found.shape)} embeddings instead of {list(exact.shape)}.")
        comparison = Comparison()
        comparison.add(found, exact)
        wanted = self.declared.tolerance(self.encoder.capabilities.precision)
        figures = (
            ("lowest cosine", comparison.lowest, wanted.lowest),
            ("first percentile of cosines", comparison.first_percentile, wanted.first_percentile),
            ("mean cosine", comparison.mean, wanted.mean),
        )
        for name, figure, least in figures:
            if not figure >= least:
                place = comparison.lowest_at.token
                raise CheckFailedError(
                    f"{what}: {name} {figure:.6f}, not {least:.6f}; the worst token is {place} of {len(found)}."
                )
        if not comparison.relative_error <= wanted.relative_error:
            raise CheckFailedError(
                f"{what}: relative error {comparison.relative_error:.2e}, over {wanted.relative_error:.1e}, "
                "at good cosines: embeddings are too long or too short."
            )

    def same(self, found: Embeddings, other: Embeddings, what: str) -> None:
        """Fail unless two answers to one question agree: to the bit if the session says that it is deterministic."""
        if found.shape != other.shape:
            raise CheckFailedError(f"{what}: {list(found.shape)} embeddings, then {list(other.shape)}.")
        if not self.encoder.capabilities.deterministic:
            self.compare(found, other, what)
        elif not np.array_equal(found, other):
            rows = int((found != other).any(axis=1).sum())
            raise CheckFailedError(
                f"{what}: {rows} of {len(found)} embeddings differ in some bits, by up to "
                f"{float(np.abs(found - other).max()):.1e}. If it is not deterministic, declare deterministic=False "
                "in its Capabilities."
            )

    def grid_lists(self, least: int = 1, most: int = 3) -> st.SearchStrategy[tuple[Grid, ...]]:
        """Grids of one call, of any that the encoder takes; often some are alike, which may share a session's call."""
        if any(isinstance(opened.program.coverage, AnyGrid) for opened in self.encoder.programs):
            side = st.integers(1, 11).map(lambda half: 2 * half)
            grid = st.builds(Grid, st.integers(1, 3), side, side)
        else:
            grid = st.sampled_from(sorted({grid for call in self.calls for grid in call}))
        return st.lists(grid, min_size=1, max_size=2).flatmap(
            lambda pool: st.lists(st.sampled_from(pool), min_size=least, max_size=most).map(tuple)
        )

    def holds(self, *strategies: st.SearchStrategy[Any]) -> Callable[[F], None]:
        """Decorator: try a property on generated examples, at once; the smallest that fails is reported."""

        def try_it(function: F) -> None:
            tried = given(*strategies)(function)
            tried = settings(
                max_examples=_EXAMPLES,
                deadline=None,
                database=None,
                print_blob=False,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
                derandomize=False,
            )(tried)
            seed(self.seed)(tried)()

        return try_it
