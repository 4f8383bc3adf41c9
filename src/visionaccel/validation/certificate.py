"""Validation: every program of a bundle is compared with the float32 reference, and the outcome is its certificate.

A certificate never covers what was not run: a program that no backend takes, that cannot be opened, or that fails on
one input has not passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
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
from visionaccel.core.arrays import Array, as_numpy, finite_rows, is_tensor
from visionaccel.core.comparison import THRESHOLDS, Comparison, Place
from visionaccel.core.grid import total_patches
from visionaccel.core.program import Program
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
from visionaccel.settings import DEADLINE, OPEN_DEADLINE
from visionaccel.validation.packed_weights import differing_weights
from visionaccel.validation.trials import Trial, Trials, bundled_photographs, find_images

logger = safe_logger(__name__)

_LONGEST_FAILURE = 4096

REFERENCE_BACKEND = "torch_ref"
REFERENCE_OPTIONS: Mapping[str, Any] = MappingProxyType({"implementation": "transformers", "dtype": "float32"})
"""transformers' own tower, which shares no arithmetic with this package: the backend's fast form is checked by it too.
"""

_TOOLS = ("numpy", "onnx", "onnxruntime", "torch", "transformers")
_NOT_RUN = "none"


@dataclass(frozen=True, slots=True)
class Validation:
    """What validating a bundle found.

    Attributes:
        certificate: What the bundle's manifest may state.
        golden: The golden images of each program, for `visionaccel.bundle.write_golden`.
    """

    certificate: Certificate
    golden: tuple[Golden, ...]


def check_thresholds(thresholds: Iterable[float]) -> None:
    """That each may be demanded of a cosine.

    Raises:
        ConfigurationError: If one is not above 0 and up to 1.
    """
    for threshold in thresholds:
        if not 0 < threshold <= 1:  # not the other way round, which NaN would pass
            raise ConfigurationError(
                f"{threshold} is no threshold for a cosine.", hint="Name a number above 0 and up to 1, such as 0.999."
            )


def check_reference(bundle: Bundle, reference: Tower) -> str:
    """The digest of a tower's weights, if it is the one that a bundle was made from.

    Raises:
        ConfigurationError: If its weights or its image processor are others.
    """
    require_processor(bundle.manifest.processor_digest, reference.checkpoint.folder, bundle.folder)
    digest = tower_digest(reference)
    if digest != bundle.manifest.weights_digest:
        raise ConfigurationError(
            f"the vision weights of {reference.checkpoint.folder} are not those that {bundle.folder} was made from.",
            hint="Pass the checkpoint that the bundle was exported from, in the dtype that it had.",
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
    """Run every program of a bundle beside the reference.

    Args:
        bundle: The bundle; nothing in it is changed.
        reference: The tower of the checkpoint that the bundle was exported from.
        backend: Name of the backend that runs the programs, or `auto`.
        device: Its device; None for the one that a program was made for, else the backend's default.
        options: The backend's options.
        images: Image files and folders of them to show; by default the photographs that scikit-image installs. None
            are shown if the reference checkpoint has no image processor.
        thresholds: The lowest cosine that passes, by precision.
        registry: Where backends are found; the installed ones by default.
        isolation: Where the programs run, as for `open_encoder`; the reference always runs in this process.
        deadline: Seconds that a call in a child process may take.
        open_deadline: Seconds that starting such a process and opening a program may take, compilation included.
        progress: Told a stage, how much of it is done and how much it is.

    Returns:
        The certificate, and what is not in it. Encodes that fail count as compared, each token with cosine -1.

    Raises:
        ConfigurationError: If the reference has other weights than the bundle was made from or cannot be run, or the
            backend, the processor, an option, a threshold or an image is not what it should be.
        InputError: If an image cannot be read.
        ArtifactError: If the reference checkpoint is broken.
    """
    demanded = {**THRESHOLDS, **thresholds}
    check_thresholds(demanded.values())
    digest = check_reference(bundle, reference)
    registry = registry or default_registry()
    tell = progress or (lambda *_: None)
    trials = _trials(reference, images)
    open_programs = partial(
        open_encoder,
        backend=backend,
        options=options,
        registry=registry,
        isolation=isolation,
        deadline=deadline,
        open_deadline=open_deadline,
    )
    opened, independent = _open_reference(reference, registry)
    with opened as exact:
        run = _Run(bundle, _Reference(exact), trials, open_programs, backend, device)
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


def _open_reference(reference: Tower, registry: Registry) -> tuple[Encoder, bool]:
    """The reference of a tower, and whether it shares nothing with what it judges."""
    opened = partial(open_encoder, reference, backend=REFERENCE_BACKEND, registry=registry, isolation="none")
    try:
        return opened(options=REFERENCE_OPTIONS), True
    except UnsupportedArchitectureError as error:
        logger.warning(
            "%s The reference is visionaccel's own tower in float32: a wrong description of the tower does not show.",
            error.message,
        )
        return opened(options={**REFERENCE_OPTIONS, "implementation": "fast"}), False


def _trials(reference: Tower, images: Sequence[Path]) -> Trials:
    folder = reference.checkpoint.folder
    if processor_digest(folder) is None:
        return Trials(reference, None, find_images(images))
    return Trials(reference, image_processor(folder), find_images(images) if images else bundled_photographs())


class _Reference:
    """What the reference makes of each trial, computed once for all programs."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._known: dict[Trial, NDArray[np.float32]] = {}

    def embeddings(self, trial: Trial, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        if trial not in self._known:
            self._known[trial] = as_numpy(self.encoder.encode(patches, trial.grids))
        return self._known[trial]


class _Own(Bundle):
    """Some of a bundle's programs, without its bare weights, which another backend could run in their place."""

    def __init__(self, bundle: Bundle, entries: Iterable[ProgramEntry]) -> None:
        manifest = bundle.manifest.model_copy(update={"programs": tuple(entries)})
        super().__init__(bundle.folder, manifest, bundle.tower)

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        wanted = set(formats)
        return tuple(program for program in self._programs if program.format in wanted)


class _Watched(Session):
    """Counts rows of NaN or infinity in what a session returns; the encoder refuses such output whole."""

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


class _Run:
    """State of one validation."""

    def __init__(
        self,
        bundle: Bundle,
        reference: _Reference,
        trials: Trials,
        open_programs: Callable[..., Encoder],
        backend: str,
        device: str | None,
    ) -> None:
        self._bundle, self._reference, self._trials, self._open_programs = bundle, reference, trials, open_programs
        self._backend, self._device = backend, device
        self._merge = bundle.tower.merge_size
        packed = bundle.manifest.checkpoint is None
        source = reference.encoder.tower.weights
        if not bundle.tower.complete:  # it holds what the host needs beside compiled programs, and no more
            source = {name: source[name] for name in bundle.tower.host_weights}
        self._wrong_weights = differing_weights(bundle.tower.weights, source) if packed else ()
        self.golden: list[Golden] = []
        self._shown: set[Trial] = set()

    @property
    def images(self) -> dict[str, int]:
        """Images that were shown, by kind."""
        real = {trial.photograph for trial in self._shown if trial.photograph}
        generated = [trial for trial in self._shown if not trial.photograph]
        return {"generated": sum(len(trial.grids) for trial in generated), "real": len(real)}

    def program(
        self, entry: ProgramEntry, thresholds: Mapping[str, float], tell: Callable[[int, int], None]
    ) -> ProgramResult:
        """Run one program on its trials."""
        threshold = thresholds[entry.quantization.dtype if entry.quantization else entry.precision]
        trials = self._trials.of(entry.covers())
        tell(0, len(trials))
        try:
            encoder = self._open([entry])
        except (UnknownBackendError, PluginError, SettingsError):
            raise  # wrong for every program, and not a program's fault
        except VisionAccelError as error:
            return self._unopened(entry, trials, threshold, str(error))
        comparison, failures, ran = Comparison(), [], []
        with encoder:
            opened = encoder.programs[0]
            opened.session = watched = _Watched(opened.session)
            # A compiler may make a program of low precision of a float32 one, and the session says so.
            computed = watched.capabilities.precision
            threshold = min(threshold, thresholds.get(computed, threshold))
            self._keep_golden(entry, trials, threshold)
            for number, trial in enumerate(trials):
                patches = trial.patches()
                expected = self._reference.embeddings(trial, patches)
                watched.nonfinite_rows = 0
                ran.append(trial)
                try:
                    comparison.add(as_numpy(encoder.encode(patches, trial.grids)), expected)
                except VisionAccelError as error:
                    comparison.add_missing(expected, watched.nonfinite_rows)
                    failures.append(f"{trial}: {error}")
                    if not isinstance(error, OutputError):
                        break  # a device that is gone would take its time-out on every further one
                tell(number + 1, len(trials))
        self._shown.update(ran)
        failure = self._verdict(comparison, ran, threshold) or self._weights_verdict()
        if failures:
            failure = failures[0] + (f" {len(failures) - 1} more encodes failed too." if len(failures) > 1 else "")
        capabilities = watched.capabilities
        return ProgramResult(
            program=entry.name,
            backend=encoder.backend,
            device=capabilities.device[:256] or _NOT_RUN,
            simulated=capabilities.simulated,
            grids=tuple(dict.fromkeys(str(grid) for trial in ran for grid in trial.grids)),
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

    def _keep_golden(self, entry: ProgramEntry, trials: Sequence[Trial], threshold: float) -> None:
        """Keep what a canary is to encode with a program: a picture, and for many grids a large one too."""
        # Pictures have what a device that misreads images gets wrong; noise is what there is without a processor.
        pictures = [t for t in trials if t.photograph is None and t.name != "noise"] or list(trials)
        by_size = sorted(pictures, key=lambda trial: total_patches(trial.grids))
        usual = next(trial for trial in pictures if trial.grids == trials[0].grids)
        for trial in dict.fromkeys([usual, by_size[-1]]):
            patches = trial.patches()
            rows = self._reference.embeddings(trial, patches)
            self.golden.append(Golden(str(trial), entry.name, trial.grids, patches, rows, threshold))

    def _open(self, entries: Sequence[ProgramEntry]) -> Encoder:
        return self._open_programs(_Own(self._bundle, entries), device=self._device or entries[0].device)

    def _verdict(self, comparison: Comparison, trials: Sequence[Trial], threshold: float) -> str | None:
        """What is wrong with the numbers, and where."""
        if comparison.lowest >= threshold:
            # As far as the lowest angle that passes moves the end of an embedding.
            allowed = math.sqrt(2 * (1 - threshold))
            if comparison.worst_length_error <= allowed:
                return None
            at = self._where(trials, comparison.worst_length_at)
            return f"an embedding's length is off by {comparison.worst_length_error:.2%}, over {allowed:.2%}, at {at}."
        low = int((comparison.cosines < threshold).sum())
        return (
            f"lowest cosine {comparison.lowest:.6f} is under {threshold}, at "
            f"{self._where(trials, comparison.lowest_at)}; so are {low} of {comparison.tokens} tokens. "
            f"Worst: {', '.join(f'{trials[at]} ({cosine:.6f})' for at, cosine in comparison.worst(3))}."
        )

    def _weights_verdict(self) -> str | None:
        """What is wrong with the weights in the bundle, which may change too little to tell from rounding."""
        wrong = self._wrong_weights
        if not wrong:
            return None
        return f"{len(wrong)} of the bundle's weights are not the reference's, such as {wrong[0]!r}."

    def _where(self, trials: Sequence[Trial], place: Place) -> str:
        return trials[place.encode].where(place.token, self._merge)

    def _unopened(self, entry: ProgramEntry, trials: Sequence[Trial], threshold: float, reason: str) -> ProgramResult:
        """The result of a program that was not run: every encode that it should have made counts as failed."""
        return ProgramResult(
            program=entry.name,
            backend=self._backend if self._backend != AUTO else _NOT_RUN,
            device=self._device or entry.device or _NOT_RUN,
            simulated=False,
            grids=(),
            images=len(trials),
            tokens=sum(grid.tokens(self._merge) for trial in trials for grid in trial.grids),
            lowest_cosine=-1.0,
            first_percentile_cosine=-1.0,
            mean_cosine=-1.0,
            relative_error=1.0,
            nonfinite_rows=0,
            threshold=threshold,
            failure=one_line(f"not run: {reason}", _LONGEST_FAILURE),
        )
