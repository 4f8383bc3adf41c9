"""Validates a bundle: compares every program with the float32 reference, and makes the bundle's certificate.

A program that no backend runs, that cannot be opened, or that fails on any input has not passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.backends import AUTO, Registry, Session, default_registry
from visionaccel.bundle import (
    Bundle,
    Certificate,
    Golden,
    ProgramEntry,
    ProgramResult,
    Progress,
    processor_digest,
    require_processor,
    toolchain,
    tower_digest,
)
from visionaccel.checkpoint import differing_weights
from visionaccel.core.arrays import Array, as_numpy, block_name, finite_rows, is_tensor
from visionaccel.core.comparison import FLOAT32_ERROR, THRESHOLDS, Comparison, Place
from visionaccel.core.defaults import DEADLINE, OPEN_DEADLINE
from visionaccel.core.grid import total_patches
from visionaccel.core.program import CHECKPOINT, Program
from visionaccel.core.safe_text import one_line, safe_logger
from visionaccel.encoder import Encoder, WantedIsolation, open_encoder
from visionaccel.errors import (
    ConfigurationError,
    OutputError,
    PluginError,
    SettingsError,
    UnknownBackendError,
    UnsupportedArchitectureError,
    VisionAccelError,
)
from visionaccel.families import Tower
from visionaccel.images import image_processor
from visionaccel.validation.trials import Trial, Trials, bundled_photographs, find_images

logger = safe_logger(__name__)

_LONGEST_FAILURE = 4096

REFERENCE_BACKEND = "torch_ref"
REFERENCE_OPTIONS: Mapping[str, Any] = MappingProxyType({"implementation": "transformers", "dtype": "float32"})
"""transformers' own tower, which shares no arithmetic with this package or the backend's fast implementation."""

_TOOLS = ("numpy", "onnx", "onnxruntime", "torch", "transformers")
_NOT_RUN = "none"


@dataclass(frozen=True, slots=True)
class Validation:
    """The result of validating a bundle.

    Attributes:
        certificate: The certificate for the bundle's manifest.
        golden: The golden images of each program, for `visionaccel.bundle.write_golden`.
    """

    certificate: Certificate
    golden: tuple[Golden, ...]


def check_thresholds(thresholds: Iterable[float]) -> None:
    """Raise a ConfigurationError for a threshold that is not above 0 and at most 1."""
    for threshold in thresholds:
        if not 0 < threshold <= 1:  # also true for NaN
            raise ConfigurationError(
                f"{threshold} is not a valid cosine threshold.", hint="Pass a number above 0 and at most 1."
            )


def check_reference(bundle: Bundle, reference: Tower) -> str:
    """Return the digest of a tower's weights; ConfigurationError if a bundle has different weights or processor."""
    require_processor(bundle.manifest.processor_digest, reference.checkpoint.folder, bundle.folder)
    digest = tower_digest(reference)
    if digest != bundle.manifest.weights_digest:
        raise ConfigurationError(
            f"the vision weights of {reference.checkpoint.folder} are not those that {bundle.folder} was made from.",
            hint="Pass the checkpoint that the bundle was exported from, in its original dtype.",
        )
    return digest


def validate_bundle(
    bundle: Bundle,
    reference: Tower,
    *,
    backend: str = AUTO,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
    images: Sequence[Path] = (),
    thresholds: Mapping[str, float] = THRESHOLDS,
    registry: Registry | None = None,
    isolation: WantedIsolation = "auto",
    deadline: float = DEADLINE,
    open_deadline: float = OPEN_DEADLINE,
    progress: Progress | None = None,
) -> Validation:
    """Run every program of a bundle, and compare its embeddings with the reference's.

    Args:
        bundle: The bundle, which is not changed.
        reference: The tower of the checkpoint that the bundle was exported from.
        backend: Name of the backend that runs the programs, or `auto`.
        device: Its device; None for the one that a program was made for, else the backend's default.
        options: The backend's options.
        images: Image files and folders to use; by default the photographs that scikit-image installs, if the reference
            checkpoint has an image processor.
        thresholds: The lowest cosine that passes, by precision.
        registry: The known backends; by default the installed ones.
        isolation: Where the programs run, as for `open_encoder`; the reference always runs in this process.
        deadline: The maximum seconds for a call in a child process.
        open_deadline: The maximum seconds to start such a process and open a program, including compilation.
        progress: Called with the progress.

    Returns:
        The certificate and the golden images. Failed encodes count too: each token has cosine -1.

    Raises:
        ConfigurationError: If the reference does not have the bundle's weights or cannot be run, or the backend, the
            image processor, an option, a threshold or an image cannot be used.
        InputError: If an image cannot be read.
        ArtifactError: If the reference checkpoint is broken.
    """
    demanded = {**THRESHOLDS, **thresholds}
    check_thresholds(demanded.values())
    digest = check_reference(bundle, reference)
    registry = registry or default_registry()
    tell = progress or (lambda *_: None)
    folder = reference.checkpoint.folder
    processor = None if processor_digest(folder) is None else image_processor(folder)
    shown = find_images(images) if images or processor is None else bundled_photographs()
    trials = Trials(reference, processor, shown)
    open_program = partial(
        open_encoder,
        backend=backend,
        options=options,
        registry=registry,
        isolation=isolation,
        deadline=deadline,
        open_deadline=open_deadline,
    )
    opened, independent = open_reference(reference, registry)
    with opened as exact:
        run = _Run(bundle, exact, trials, open_program, backend, device)
        results = tuple(run.program(entry, demanded, partial(tell, entry.name)) for entry in bundle.manifest.programs)
    plugins = {registry.entry(result.backend).distribution for result in results if result.backend != _NOT_RUN}
    certificate = Certificate(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        reference=digest,
        independent=independent,
        images=run.images,
        programs=results,
        toolchain=toolchain((*_TOOLS, *sorted(plugins))),
        passed=all(result.failure is None for result in results),
    )
    return Validation(certificate, tuple(run.golden))


def open_reference(source: Tower | Path, registry: Registry) -> tuple[Encoder, bool]:
    """Open the float32 reference on a tower or a checkpoint.

    Returns:
        The encoder, which the caller closes, and whether it is independent of visionaccel's description of the tower.
    """
    opened = partial(open_encoder, source, backend=REFERENCE_BACKEND, registry=registry, isolation="none")
    try:
        return opened(options=REFERENCE_OPTIONS), True
    except UnsupportedArchitectureError as error:
        logger.warning(
            "%s The reference is visionaccel's own float32 tower, so a wrong description of the tower goes unnoticed.",
            error.message,
        )
        return opened(options={**REFERENCE_OPTIONS, "implementation": "fast"}), False


class _Alone(Bundle):
    """A bundle with only one of its programs, and without its weights, which a backend could run instead."""

    def __init__(self, bundle: Bundle, entry: ProgramEntry) -> None:
        super().__init__(bundle.folder, bundle.manifest.model_copy(update={"programs": (entry,)}), bundle.tower)

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        return super().programs(set(formats) - {CHECKPOINT})


class _Watched(Session):
    """Counts rows with NaN or infinity in the outputs of a session, because the encoder refuses such outputs whole."""

    def __init__(self, session: Session) -> None:
        self._session, self.capabilities = session, session.capabilities
        self.nonfinite_rows = 0

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = self._session.run(inputs)
        for array in outputs.values():
            if (is_tensor(array) or isinstance(array, np.ndarray)) and array.ndim == 2:
                self.nonfinite_rows += int((~finite_rows(array)).sum())
        return outputs

    def close(self) -> None:
        self._session.close()


@dataclass(eq=False)
class _Run:
    """One validation: its inputs, the reference's embeddings of each trial, the trials run, and the golden images."""

    bundle: Bundle
    reference: Encoder
    trials: Trials
    open_program: Callable[..., Encoder]
    backend: str
    device: str | None
    embeddings: dict[Trial, NDArray[np.float32]] = field(default_factory=dict)
    shown: set[Trial] = field(default_factory=set)
    golden: list[Golden] = field(default_factory=list)

    @cached_property
    def wrong_weights(self) -> tuple[str, ...]:
        """Names of the bundle's weights that are not the reference's."""
        tower, source = self.bundle.tower, self.reference.tower.weights
        if self.bundle.manifest.checkpoint is not None:
            return ()
        if not tower.complete:  # it has only the weights that the host needs for compiled programs
            source = {name: source[name] for name in tower.host_weights}
        return differing_weights(tower.weights, source)

    @property
    def images(self) -> dict[str, int]:
        """Number of images that were encoded, by kind."""
        real = {trial.photograph for trial in self.shown if trial.photograph}
        generated = [trial for trial in self.shown if not trial.photograph]
        return {"generated": sum(len(trial.grids) for trial in generated), "real": len(real)}

    def program(
        self, entry: ProgramEntry, thresholds: Mapping[str, float], tell: Callable[[int, int], None]
    ) -> ProgramResult:
        """Run one program on its trials."""
        threshold = thresholds[entry.quantization.dtype if entry.quantization else entry.precision]
        trials, comparison = self.trials.of(entry.covers()), Comparison(self.bundle.tower.spec.out)
        tell(0, len(trials))
        try:
            encoder = self.open_program(_Alone(self.bundle, entry), device=self.device or entry.device)
        except (UnknownBackendError, PluginError, SettingsError):
            raise  # not the program's fault: all programs would fail
        except VisionAccelError as error:
            for trial in trials:
                tokens = sum(grid.tokens(self.bundle.tower.merge_size) for grid in trial.grids)
                comparison.add_missing(np.ones((tokens, self.bundle.tower.out_width), np.float32))
            backend = self.backend if self.backend != AUTO else _NOT_RUN
            device = self.device or entry.device or _NOT_RUN
            where = {"backend": backend, "device": device, "simulated": False, "grids": ()}
            return _result(entry, comparison, threshold, f"not run: {error}", where)
        failures, ran = [], []
        with encoder:
            opened = encoder.programs[0]
            opened.session = watched = _Watched(opened.session)
            # A compiler may lower the precision of a float32 program; the session has the actual one.
            computed = watched.capabilities.precision
            threshold = min(threshold, thresholds.get(computed, threshold))
            self._keep_golden(entry, trials, threshold)
            for number, trial in enumerate(trials):
                patches = trial.patches()
                expected = self._expected(trial, patches)
                watched.nonfinite_rows = 0
                ran.append(trial)
                try:
                    comparison.add(as_numpy(encoder.encode(patches, trial.grids)), expected)
                except VisionAccelError as error:
                    comparison.add_missing(expected, watched.nonfinite_rows)
                    failures.append(f"{trial}: {error}")
                    if not isinstance(error, OutputError):
                        break  # a lost device would run into its deadline on every other trial
                tell(number + 1, len(trials))
        self.shown.update(ran)
        in_float32 = entry.quantization is None and (entry.precision, computed) == ("float32", "float32")
        exact = in_float32 and threshold >= THRESHOLDS["float32"]  # a lower one is the caller's wish
        failure = self._verdict(comparison, ran, threshold, exact=exact)
        if failures:
            failure = failures[0] + (f" {len(failures) - 1} more encodes failed." if len(failures) > 1 else "")
        device, simulated = watched.capabilities.device[:256] or _NOT_RUN, watched.capabilities.simulated
        grids = tuple(dict.fromkeys(str(grid) for trial in ran for grid in trial.grids))
        where = {"backend": encoder.backend, "device": device, "simulated": simulated, "grids": grids}
        return _result(entry, comparison, threshold, failure, where)

    def _expected(self, trial: Trial, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the reference's embeddings of a trial, computed once for all programs."""
        if trial not in self.embeddings:
            self.embeddings[trial] = as_numpy(self.reference.encode(patches, trial.grids))
        return self.embeddings[trial]

    def _keep_golden(self, entry: ProgramEntry, trials: Sequence[Trial], threshold: float) -> None:
        """Keep golden images for a program: a picture of a usual size, and the largest one if that differs."""
        # Pictures show more faults of a device than noise, but they need a processor.
        pictures = [t for t in trials if t.photograph is None and t.name != "noise"] or list(trials)
        by_size = sorted(pictures, key=lambda trial: total_patches(trial.grids))
        usual = next(trial for trial in pictures if trial.grids == trials[0].grids)
        for trial in dict.fromkeys([usual, by_size[-1]]):
            patches = trial.patches()
            rows = self._expected(trial, patches)
            self.golden.append(Golden(str(trial), entry.name, trial.grids, patches, rows, threshold))

    def _verdict(self, comparison: Comparison, trials: Sequence[Trial], threshold: float, *, exact: bool) -> str | None:
        """Return what is wrong with the embeddings, and where, or with the bundle's weights; None if nothing is.

        An exact program computes in float32, so that only rounding may differ.
        """

        def where(place: Place) -> str:
            found = trials[place.encode].where(place.token, self.bundle.tower.merge_size)
            return found + block_name(place.block)

        if comparison.lowest < threshold:
            return (
                f"lowest cosine {comparison.lowest:.6f} is under {threshold}, at {where(comparison.lowest_at)}, as are "
                f"{comparison.tokens_below(threshold)} of {comparison.tokens} tokens. "
                f"Worst: {', '.join(f'{trials[at]} ({cosine:.6f})' for at, cosine in comparison.worst(3))}."
            )
        # The largest angle that passes moves the end of an embedding by this part of its length.
        allowed, (worst, place) = math.sqrt(2 * (1 - threshold)), comparison.worst_length
        if worst > allowed:
            return f"an embedding's length is off by {worst:.2%}, at {where(place)}; the limit is {allowed:.2%}."
        if exact and comparison.relative_error > FLOAT32_ERROR:
            return (
                f"relative error {comparison.relative_error:.1e} is over {FLOAT32_ERROR:.0e}, which is more than "
                "rounding in float32: an activation or a small term may be wrong."
            )
        wrong = self.wrong_weights
        return (
            f"{len(wrong)} of the bundle's weights differ from the reference's, such as {wrong[0]!r}."
            if wrong
            else None
        )


def _result(
    entry: ProgramEntry, comparison: Comparison, threshold: float, failure: str | None, where: Mapping[str, Any]
) -> ProgramResult:
    return ProgramResult(
        program=entry.name,
        **where,
        images=comparison.encodes,
        tokens=comparison.tokens,
        lowest_cosine=comparison.lowest,
        first_percentile_cosine=comparison.first_percentile,
        mean_cosine=comparison.mean,
        relative_error=comparison.relative_error,
        nonfinite_rows=comparison.nonfinite_rows,
        threshold=threshold,
        failure=None if failure is None else one_line(failure, _LONGEST_FAILURE),
    )
