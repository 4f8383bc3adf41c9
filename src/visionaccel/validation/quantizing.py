"""A bundle of int8 programs from one of float32: a backend quantizes, the float32 reference judges."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visionaccel.backends import QuantizedModel, Registry, default_registry, select
from visionaccel.bundle import (
    Bundle,
    ProgramEntry,
    Progress,
    appearing,
    open_bundle,
    stated_file,
    toolchain,
    write_golden,
    write_manifest,
)
from visionaccel.core.arrays import Array, as_numpy
from visionaccel.core.comparison import THRESHOLDS
from visionaccel.core.program import Program
from visionaccel.errors import AccuracyError, ConfigurationError, InputError, PluginError
from visionaccel.families import Host, Tower
from visionaccel.images import image_processor
from visionaccel.validation.certificate import Validation, check_reference, check_thresholds, validate_bundle
from visionaccel.validation.trials import Trials, find_images

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
) -> Bundle:
    """Quantize every program of a bundle, validate the result, and keep it if it is good enough.

    Args:
        bundle: A bundle of float32 programs; nothing in it is changed.
        output: The folder to write; it appears whole with its certificate, or not at all.
        images: Image files, and folders of them, to calibrate with.
        target: Name of the backend that quantizes and that runs the result.
        reference: The tower of the checkpoint that the bundle was exported from; by default over the bundle's weights,
            which must be in the dtype that the checkpoint has.
        device: The backend's device to validate on.
        threshold: The lowest cosine of a token that is good enough.
        judged_by: Images to validate with; by default those that `validate_bundle` shows.
        force: Replace an existing bundle.
        registry: Where backends are found; the installed ones by default.
        progress: Called with a stage, how much of it is done and how much it is.

    Raises:
        ConfigurationError: If the target is not installed, is broken, does not quantize these programs or cannot run
            them on the device, there are no images or no processor to make patches of them, the threshold is not one,
            the reference has other weights, or `output` exists, cannot be written, or holds what is read.
        ArtifactError: If the bundle's files are broken.
        AccuracyError: If a program is too far from the reference; it says how far and on which images.
        InputError: If an image cannot be read.
    """
    tell = progress or (lambda *_: None)
    registry = registry or default_registry()
    backend = registry.load(target)
    reference = reference or bundle.tower
    # What can be refused is refused before the work, which takes minutes for each program.
    check_thresholds([threshold])
    check_reference(bundle, reference)
    programs = _programs(bundle, registry, target, device)
    files = find_images(images)
    if not files:
        raise ConfigurationError("there are no images to calibrate with.", hint="Name some with --calibrate.")
    for image in (*files, *find_images(judged_by)):
        if not image.is_file():
            raise InputError(f"{image} is not a file.", hint="Name image files, or folders of them.")
    trials = Trials(reference, image_processor(reference.checkpoint.folder), files)
    output = Path(os.path.realpath(output))
    weights = {tensor.file for tensor in bundle.tower.weights.values()}
    if any(file.is_relative_to(output) for file in (bundle.folder.resolve(), *weights)):
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
        releases = {**bundle.manifest.toolchain, **toolchain(sorted(tools))}
        changes = {"programs": entries, "toolchain": releases, "certificate": None}
        write_manifest(folder, {**bundle.manifest.model_dump(mode="json"), **changes})
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
        write_golden(quantized, found.golden, {"certificate": found.certificate.model_dump(mode="json")})
    return open_bundle(output, checkpoint=bundle.tower.checkpoint)


def _programs(bundle: Bundle, registry: Registry, target: str, device: str | None) -> tuple[Program, ...]:
    """The programs in the manifest's order, if they are of float32 and the target runs all of them as they are.

    Then what fails later is the fault of what was made of them.
    """
    for entry in bundle.manifest.programs:
        if entry.precision != "float32" or entry.quantization is not None:
            raise ConfigurationError(
                f"program {entry.name!r} is not of float32.", hint="Export the bundle in float32 and quantize that."
            )
    _, taken = select(registry, bundle, target, device).require()
    found = {program.name: program for program in taken}
    for entry in bundle.manifest.programs:
        if entry.name not in found:
            raise ConfigurationError(
                f"backend {target!r} does not run program {entry.name!r} on device {device or 'of its choice'}.",
                hint="`visionaccel explain` says why. Name another target or --device.",
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
    """The photographs of trials as a program's session would be given them, one image in a call.

    Yields numpy arrays by the names of the program's inputs, with the dtypes and shapes declared there.
    """

    def __init__(self, program: Program, host: Host, trials: Trials) -> None:
        self._host = host
        self._trials = [trial for trial in trials.of(program.coverage) if trial.photograph]

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        for trial in self._trials:
            inputs = self._host.inputs(trial.patches(), trial.grids)
            yield {name: as_numpy(array) for name, array in inputs.items()}
