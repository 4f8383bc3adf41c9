"""A bundle of int8 programs from one of float32: a backend quantizes, the float32 reference judges."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visionaccel.backends import QuantizedModel, Registry, VisionBackend, default_registry, select
from visionaccel.bundle import (
    MANIFEST,
    Bundle,
    ProgramEntry,
    Progress,
    appearing,
    as_json,
    open_bundle,
    seal,
    stated_file,
    toolchain,
    write_file,
    write_golden,
)
from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.comparison import THRESHOLDS
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, Program
from visionaccel.errors import AccuracyError, ConfigurationError, InputError, PluginError
from visionaccel.families import Host, Tower
from visionaccel.images import image_processor
from visionaccel.validation.certificate import (
    Validation,
    check_reference,
    check_thresholds,
    validate_bundle,
)
from visionaccel.validation.trials import Trial, Trials, find_images

QUANTIZED = "int8"
"""What programs are quantized to."""


def quantize_bundle(
    bundle: Bundle,
    output: Path,
    images: Sequence[Path],
    *,
    target: str,
    reference: Tower | None = None,
    device: str | None = None,
    threshold: float = THRESHOLDS[QUANTIZED],
    judged_by: Sequence[Path] = (),
    force: bool = False,
    registry: Registry | None = None,
    progress: Progress | None = None,
    report: Callable[[Validation], None] = lambda _: None,
) -> Bundle:
    """Quantize every program of a bundle, validate the result, and keep it if it is good enough.

    Args:
        bundle: Of float32 programs; nothing in it is changed.
        output: The folder to write; it appears whole with its certificate, or not at all.
        images: Files, and folders of them, to calibrate with.
        target: Name of the backend that quantizes and that runs the result.
        reference: The tower of the checkpoint that the bundle was exported from; by default over the bundle's weights,
            which must be in the dtype that the checkpoint has.
        device: The backend's device to validate on.
        threshold: The lowest cosine of a token that is good enough.
        judged_by: Images to validate with; by default those that `validate_bundle` shows.
        force: Replace an existing bundle.
        registry: Where backends are found; the installed ones by default.
        progress: Told a stage, how much of it is done and how much it is.
        report: Called with what validating the result found, if it is good enough.

    Raises:
        UnknownBackendError: If the target is not installed.
        PluginError: If its plug-in is broken.
        ConfigurationError: If the target does not quantize these programs or cannot run them on the device, there are
            no images or no processor to make patches of them, the threshold is none, the reference is of other weights,
            or `output` exists, cannot be written, or holds what is read.
        ArtifactError: If the bundle's files are broken.
        AccuracyError: If a program is too far from the reference; it says how far and on which images.
        InputError: If an image cannot be read.
    """
    tell = progress or (lambda *_: None)
    registry = registry or default_registry()
    backend = registry.load(target)
    programs = _programs(bundle, backend)
    reference = reference or bundle.tower
    # Whatever can be said before the work is: it takes minutes for each program.
    check_thresholds([threshold])
    check_reference(bundle, reference)
    _check_runs(bundle, registry, target, device)
    files = find_images(images)
    if not files:
        raise ConfigurationError("there are no images to calibrate with.", hint="Name some with --calibrate.")
    for image in (*files, *find_images(judged_by)):
        if not image.is_file():
            raise InputError(f"{image} is no file.", hint="Name image files, or folders of them.")
    trials = Trials(reference, image_processor(reference.checkpoint.folder), files)
    output = Path(os.path.realpath(output))
    if any(file.is_relative_to(output) for file in (bundle.folder.resolve(), *_weight_files(bundle))):
        raise ConfigurationError(
            f"{output} holds the bundle or its weights, and would be replaced.", hint="Name another folder."
        )
    with appearing(output, force=force) as folder:
        for file in bundle.manifest.files:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(bundle.folder / file.path, folder / file.path)
        entries, tools = [], {registry.entry(target).distribution}
        for number, (entry, program) in enumerate(zip(bundle.manifest.programs, programs, strict=True)):
            tell("programs", number, len(programs))
            calibration = Calibration(program, bundle.tower.host(program), trials)
            model = backend.quantize(program, calibration, folder)
            entries.append(_entry(folder, entry, model, target, len(calibration)))
            tools.update(model.tools)
        tell("programs", len(programs), len(programs))
        _write_manifest(folder, bundle, entries, tools)
        quantized = open_bundle(folder, checkpoint=bundle.tower.checkpoint)
        found = validate_bundle(
            quantized,
            reference,
            backend=target,
            device=device,
            images=judged_by,
            thresholds={QUANTIZED: threshold},
            registry=registry,
            progress=progress,
        )
        if not found.certificate.passed:
            raise AccuracyError(_shortfall(found), hint="Show other images, or accept less with --threshold.")
        report(found)
        write_golden(quantized, found.golden, {"certificate": found.certificate.model_dump(mode="json")})
    return open_bundle(output, checkpoint=bundle.tower.checkpoint)


def _check_runs(bundle: Bundle, registry: Registry, target: str, device: str | None) -> None:
    """That the target runs the programs as they are, so that what fails later is for what was made of them."""
    _, taken = select(registry, bundle, target, device).require()
    left = [entry.name for entry in bundle.manifest.programs if entry.name not in {each.name for each in taken}]
    if left:
        raise ConfigurationError(
            f"backend {target!r} does not run program {left[0]!r} on device {device or 'of its choice'}.",
            hint="`visionaccel explain` says why. Name another target or --device.",
        )


def _weight_files(bundle: Bundle) -> set[Path]:
    return {tensor.file for tensor in bundle.tower.weights.values()}


def _programs(bundle: Bundle, backend: VisionBackend) -> tuple[Program, ...]:
    """The programs in the manifest's order, if the backend takes all of them."""
    found = {program.name: program for program in bundle.programs(backend.formats)}
    for entry in bundle.manifest.programs:
        if entry.name not in found:
            raise ConfigurationError(
                f"backend {backend.name!r} does not take program {entry.name!r} of format {entry.format!r}.",
                hint="Name another target.",
            )
        if entry.precision != "float32" or entry.quantization is not None:
            raise ConfigurationError(
                f"program {entry.name!r} is not of float32.", hint="Export the bundle in float32 and quantize that."
            )
    return tuple(found[entry.name] for entry in bundle.manifest.programs)


def _entry(folder: Path, entry: ProgramEntry, model: QuantizedModel, target: str, images: int) -> dict[str, Any]:
    """The manifest's entry of a quantized program; companions of the other may be of no use to it, and are left out."""
    written = (model.model, *model.companions.values())
    if any(not file.is_relative_to(folder) or not file.is_file() for file in written):
        raise PluginError(
            f"backend {target!r} names files that it did not write into the bundle.", hint="Report it to its authors."
        )
    return {
        **entry.model_dump(mode="json"),
        "format": model.format,
        "model": model.model.relative_to(folder).as_posix(),
        "files": [stated_file(folder, file) for file in dict.fromkeys(written)],
        "companions": {role: file.relative_to(folder).as_posix() for role, file in model.companions.items()},
        "quantization": {
            "dtype": QUANTIZED,
            "method": model.method,
            "target": target,
            "calibration_images": images,
        },
    }


def _write_manifest(folder: Path, bundle: Bundle, entries: Sequence[Mapping[str, Any]], tools: Iterable[str]) -> None:
    stated = bundle.manifest.model_dump(mode="json")
    releases = {**stated["toolchain"], **toolchain(sorted(tools))}
    manifest = seal({**stated, "programs": list(entries), "toolchain": releases, "certificate": None})
    write_file(folder / MANIFEST, as_json(manifest.model_dump(mode="json")))


def _shortfall(validation: Validation) -> str:
    """What was not good enough, in figures."""
    found = [
        f"{result.program} has lowest cosine {result.lowest_cosine:.6f}, mean {result.mean_cosine:.6f}, relative error "
        f"{result.relative_error:.1e}: {result.failure}"
        for result in validation.certificate.programs
        if result.failure is not None
    ]
    return "the quantized programs are too far from the float32 reference, and nothing was kept: " + " ".join(found)


class Calibration:
    """The images of some trials as a program's session would be given them, one image in a call.

    Yields numpy arrays by the names of the program's inputs, with the dtypes and shapes declared there.

    Args:
        program: Decides to which grids images are fitted.
        host: Its host's part.
        trials: Has the images, and the processor that makes patches of them.

    Raises:
        BundleError: If no image fits the program.
        InputError: If an image is of an impossible aspect ratio.
    """

    def __init__(self, program: Program, host: Host, trials: Trials) -> None:
        self._host = host
        self._single = not isinstance(program.coverage, AnyGrid)
        self._trials: Sequence[Trial] = [trial for trial in trials.of(program.coverage) if trial.photograph]

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        for trial in self._trials:
            grids: list[Grid] = [grid.frame for grid in trial.grids] if self._single else list(trial.grids)
            inputs = self._host.inputs(trial.patches(), grids)
            yield {name: as_numpy(array) for name, array in inputs.items()}
