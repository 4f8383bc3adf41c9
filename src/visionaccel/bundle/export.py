"""Exports a bundle from a checkpoint: streams the weights, writes the graphs, and finally the manifest."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionaccel.bundle.bundle import Bundle, open_bundle, tower_digest
from visionaccel.bundle.folder import (
    appearing,
    external_checkpoint,
    new_manifest,
    require_space,
    stated_file,
    write_description,
    write_file,
    write_manifest,
)
from visionaccel.bundle.manifest import MOST_PATCHES, stated_coverage
from visionaccel.checkpoint import SINGLE_FILE, Checkpoint, write_safetensors
from visionaccel.core.dtypes import DTYPES
from visionaccel.core.program import (
    ONNX,
    ONNX_FUSED,
    ONNX_STANDARD,
    AnyGrid,
    Bucket,
    Coverage,
    FixedGrid,
    OperatorDialect,
    Precision,
)
from visionaccel.errors import ConfigurationError
from visionaccel.families import Tower, tower_of

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and its total, both in bytes of weights or in programs."""


@dataclass(frozen=True, slots=True)
class ProgramRequest:
    """A program to write.

    Attributes:
        coverage: Which grids it takes.
        split_host: Leave the patch embedding, learned positions and the order of windows to the host. Only for fixed
            shapes.
        dialect: The operators to use; None for standard ones in a program of fixed shapes, else ONNX Runtime's own.
    """

    coverage: Coverage
    split_host: bool = False
    dialect: OperatorDialect | None = None


def export_bundle(
    tower: Tower,
    output: Path,
    requests: Sequence[ProgramRequest],
    *,
    source: str | None = None,
    revision: str | None = None,
    self_contained: bool = False,
    precision: Precision = "float32",
    device: str | None = None,
    companions: Mapping[str, bytes] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write a bundle and open it.

    Args:
        tower: The tower of the checkpoint.
        output: The folder to write; it appears whole or not at all.
        requests: The programs, in order of preference.
        source: Where users find the checkpoint: a folder or a Hugging Face repository. Default: its folder.
        revision: The revision of that repository.
        self_contained: Pack the weights into the bundle, in `precision`; otherwise they stay in the checkpoint.
        precision: Dtype of the programs' weights and activations.
        device: Kind of device that the programs are for; None for any.
        companions: JSON files that a backend needs next to each program, such as a compiler's configuration, by their
            role; `NAME.json` is written for role `NAME`.
        force: Replace an existing bundle.
        progress: Called with the progress.

    Raises:
        ConfigurationError: If there are no requests, two have the same coverage, one is for several frames or too many
            patches, or `output` exists, cannot be written, or contains the weights that it would refer to.
        CheckpointError: If a weight is missing or does not fit the configuration or the precision.
    """
    tell = progress or (lambda *_: None)
    names = [program_name(request.coverage) for request in requests]
    if not requests or len(set(names)) != len(names):
        raise ConfigurationError(
            "no program was requested, or one was requested twice.", hint="Pass each grid, bucket or --dynamic once."
        )
    for request in requests:
        _check_size(request.coverage)
    if device is not None and not device.isidentifier():
        raise ConfigurationError(
            f"{device!r} is not a device kind.",
            hint="Pass only the kind, such as npu; the device itself is chosen at startup.",
        )
    output = Path(os.path.realpath(output))  # if it is a link to a bundle, that bundle is replaced
    if not self_contained and any(tensor.file.is_relative_to(output) for tensor in tower.weights.values()):
        raise ConfigurationError(
            f"{output} contains the weights themselves, and would be replaced by references to them.",
            hint="Choose a different folder, or pack the weights with --self-contained.",
        )
    total = sum(tensor.length for tensor in tower.weights.values())
    with appearing(output, force=force) as folder:
        digest = tower_digest(tower, progress=counter("digest of the weights", total, tell))
        packed = _pack(tower, folder, precision, total, tell) if self_contained else tower
        files = sorted(folder.iterdir())
        written = {role: folder / f"{role}.json" for role in companions or {}}
        for role, data in (companions or {}).items():
            write_file(written[role], data)
        entries = []
        for number, (request, name) in enumerate(zip(requests, names, strict=True)):
            tell("programs", number, len(requests))
            entries.append(_write_program(packed, folder, name, request, precision, device, written))
        tell("programs", len(requests), len(requests))
        checkpoint = None if self_contained else external_checkpoint(tower, source, revision)
        write_manifest(folder, new_manifest(folder, tower, digest, files, entries, checkpoint))
    return open_bundle(output, checkpoint=tower.checkpoint)


def program_name(coverage: Coverage) -> str:
    """Return the name of an exported program, such as `58x74`, `bucket-4292x80` or `dynamic`."""
    match coverage:
        case FixedGrid(grid=grid):
            return f"{grid.h}x{grid.w}"
        case Bucket(sizes=sizes):
            return "bucket-" + "x".join(map(str, sizes.values()))
        case AnyGrid():
            return "dynamic"


def _check_size(coverage: Coverage) -> None:
    match coverage:
        case AnyGrid():
            return
        case FixedGrid(grid=grid):
            frames, patches = grid.t, grid.patches
        case Bucket():
            frames, patches = 1, coverage.patches
    if frames != 1 or patches > MOST_PATCHES:
        raise ConfigurationError(
            f"a program of fixed shapes encodes one frame of at most {MOST_PATCHES} patches, not {coverage} "
            f"with {patches} patches in {frames} frames.",
            hint="Choose a smaller grid, or write a program for any grid.",
        )


def _pack(tower: Tower, folder: Path, precision: Precision, total: int, tell: Progress) -> Tower:
    """Write configuration, image processor and weights into the folder, and return the tower with these weights."""
    needed = sum(math.prod(tensor.shape) for tensor in tower.weights.values()) * DTYPES[precision].bytes
    require_space(folder.parent, needed, "the tower", "Free some space, or leave the weights in the checkpoint.")
    named = {tower.stored_name(name): tensor for name, tensor in tower.weights.items()}
    progress = counter("weights", total, tell)
    write_safetensors(folder / SINGLE_FILE, named, dtype=precision, metadata={"format": "pt"}, progress=progress)
    write_description(tower, folder)
    return tower_of(Checkpoint(folder))


def counter(stage: str, total: int, tell: Progress) -> Callable[[int], None]:
    """Return a function that adds up the sizes of pieces and reports the sum as progress."""
    done = 0

    def count(piece: int) -> None:
        nonlocal done
        done += piece
        tell(stage, done, total)

    return count


def _write_program(
    tower: Tower,
    folder: Path,
    name: str,
    request: ProgramRequest,
    precision: Precision,
    device: str | None,
    companions: Mapping[str, Path],
) -> dict[str, Any]:
    split = tower.split(request.coverage) if request.split_host else None
    path = folder / f"{name}.onnx"
    model = tower.onnx_model(coverage=request.coverage, precision=precision, host=split, dialect=request.dialect)
    write_file(path, model)
    inputs, outputs = tower.signature(request.coverage, split)
    return {
        "name": name,
        "format": _format(request),
        "model": path.name,
        "files": [stated_file(folder, file) for file in (path, *companions.values())],
        "companions": {role: file.name for role, file in companions.items()},
        "inputs": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in inputs],
        "outputs": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in outputs],
        "coverage": stated_coverage(request.coverage).model_dump(mode="json"),
        "precision": precision,
        "device": device,
        "host": {"order": split.order, "tensors": list(tower.host_weights)} if split else None,
    }


def _format(request: ProgramRequest) -> str:
    if isinstance(request.coverage, AnyGrid):
        return ONNX_STANDARD if request.dialect == "standard" else ONNX
    return ONNX_FUSED if request.dialect == "microsoft" else ONNX
