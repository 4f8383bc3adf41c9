"""Makes a bundle of int8 programs from one of float32 programs: a backend quantizes, and validation checks them."""

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
"""The dtype that programs are quantized to."""


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
    """Quantize every program of a bundle, validate the result, and keep it if it is accurate enough.

    Args:
        bundle: A bundle of float32 programs, which is not changed.
        output: The folder to write; it appears whole with its certificate, or not at all.
        images: Image files and folders to calibrate with.
        target: Name of the backend that quantizes the programs and runs the result.
        reference: The tower of the checkpoint that the bundle was exported from; by default that of the bundle's
            weights, which must have the checkpoint's dtype.
        device: The backend's device to validate on.
        threshold: The lowest cosine of a token that passes.
        judged_by: Images to validate with; by default those of `validate_bundle`.
        force: Replace an existing bundle.
        registry: The known backends; by default the installed ones.
        progress: Called with the progress.

    Raises:
        ConfigurationError: If the target is not installed, is broken, does not quantize these programs or cannot run
            them on the device, there are no images or no image processor, the threshold is invalid, the reference has
            different weights, or `output` exists, cannot be written, or contains the bundle or its weights.
        ArtifactError: If the bundle's files are broken.
        AccuracyError: If a program differs too much from the reference; it says how much and on which images.
        InputError: If an image cannot be read.
    """
    tell = progress or (lambda *_: None)
    registry = registry or default_registry()
    backend = registry.load(target)
    reference = reference or bundle.tower
    # Check everything before the work, which takes minutes for each program.
    check_thresholds([threshold])
    check_reference(bundle, reference)
    programs = _programs(bundle, registry, target, device)
    files = find_images(images)
    if not files:
        raise ConfigurationError("no calibration images were passed.", hint="Pass some with --calibrate.")
    for image in (*files, *find_images(judged_by)):
        if not image.is_file():
            raise InputError(f"{image} is not a file.", hint="Pass image files, or folders of them.")
    trials = Trials(reference, image_processor(reference.checkpoint.folder), files)
    output = Path(os.path.realpath(output))
    weights = {tensor.file for tensor in bundle.tower.weights.values()}
    if any(file.is_relative_to(output) for file in (bundle.folder.resolve(), *weights)):
        raise ConfigurationError(
            f"{output} contains the bundle or its weights, and would be replaced.", hint="Choose a different folder."
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
            raise AccuracyError(
                _shortfall(found), hint="Calibrate with other images, or lower the limit with --threshold."
            )
        write_golden(quantized, found.golden, {"certificate": found.certificate.model_dump(mode="json")})
    return open_bundle(output, checkpoint=bundle.tower.checkpoint)


def _programs(bundle: Bundle, registry: Registry, target: str, device: str | None) -> tuple[Program, ...]:
    """Return the programs in the manifest's order; require float32 programs that the target can run unquantized.

    So a program that fails after quantization fails because of it.
    """
    for entry in bundle.manifest.programs:
        if entry.precision != "float32" or entry.quantization is not None:
            raise ConfigurationError(
                f"program {entry.name!r} is not a float32 program.",
                hint="Quantize a bundle exported in float32.",
            )
    _, taken = select(registry, bundle, target, device).require()
    found = {program.name: program for program in taken}
    for entry in bundle.manifest.programs:
        if entry.name not in found:
            raise ConfigurationError(
                f"backend {target!r} does not run program {entry.name!r} on {device or 'its default device'}.",
                hint="`visionaccel explain` says why. Choose a different --target or --device.",
            )
    return tuple(found[entry.name] for entry in bundle.manifest.programs)


def _entry(folder: Path, entry: ProgramEntry, model: QuantizedModel, target: str, images: int) -> dict[str, Any]:
    """Return the manifest's entry of a quantized program; it does not keep the companions of the original."""
    written = (model.model, *model.companions.values())
    if any(not file.is_relative_to(folder) or not file.is_file() for file in written):
        raise PluginError(
            f"backend {target!r} returned files that it did not write into the bundle.",
            hint="Report this to its authors.",
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
    """Describe how much the failed programs differ from the reference."""
    found = [
        f"{result.program} has lowest cosine {result.lowest_cosine:.6f}, mean {result.mean_cosine:.6f}, relative error "
        f"{result.relative_error:.1e}: {result.failure}"
        for result in validation.certificate.programs
        if result.failure is not None
    ]
    return "the quantized programs differ too much from the reference, so nothing was kept: " + " ".join(found)


class Calibration:
    """The inputs of a program's session for the photographs of its trials, one image in a call.

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
