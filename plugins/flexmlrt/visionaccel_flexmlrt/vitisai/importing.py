"""Makes a bundle of artifacts that AMD's Vitis AI compiler wrote, once their grids and weights are known."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visionaccel.bundle import (
    Bundle,
    Progress,
    appearing,
    as_json,
    counter,
    external_checkpoint,
    new_manifest,
    open_bundle,
    program_name,
    read_strip_note,
    require_space,
    stated_coverage,
    stated_file,
    tower_digest,
    write_description,
    write_file,
    write_manifest,
)
from visionaccel.checkpoint import SINGLE_FILE, write_safetensors
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.program import DEVICE_TENSORS, EP_CONTEXT, HOST_AFTER, HOST_BEFORE, FixedGrid, Precision
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import BundleError, ConfigurationError
from visionaccel.families import Tower
from visionaccel_flexmlrt.vitisai.extraction import extract_host
from visionaccel_flexmlrt.vitisai.findings import Findings, find, narrowest
from visionaccel_flexmlrt.vitisai.graph import EXPORT_AGAIN, OnnxGraph
from visionaccel_flexmlrt.vitisai.layout import Boundary, ImportRequest
from visionaccel_flexmlrt.vitisai.recognition import HostPart


@dataclass(frozen=True, slots=True)
class Imported:
    """An open bundle that was just written, and what its user should know."""

    bundle: Bundle
    warnings: tuple[str, ...]


def import_vitisai(
    tower: Tower,
    requests: Sequence[ImportRequest],
    output: Path,
    *,
    self_contained: bool = False,
    source: str | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Check artifacts against the checkpoint that they were made from, write a bundle of them and open it.

    Args:
        tower: The checkpoint's tower; its vision weights may have been stripped.
        requests: What to import, each for a different grid.
        output: The folder to write; it appears whole or not at all.
        self_contained: Put the host's weights into the bundle, so that it does not refer to the checkpoint.
        source: Where users find the checkpoint: a folder or a Hugging Face repository. Default: its folder.
        revision: That repository's revision.
        force: Replace an existing bundle.
        progress: Called as the work progresses.

    Raises:
        BundleError: If a file is damaged, the artifact is of a different checkpoint, grid or window order, or its host
            part is not recognised and may not run on ONNX Runtime.
        CheckpointError: If a weight that is needed cannot be read.
        ConfigurationError: If something is missing or ambiguous, or `output` exists or cannot be written.
    """
    tell = progress or (lambda *_: None)
    weights = tower.weights if tower.stored_names else {}  # they may have been stripped
    found = [find(tower, request, weights) for request in requests]
    _check_together(found)
    output = Path(os.path.realpath(output))
    sources = {tensor.file for tensor in weights.values()}
    for each in found:
        sources |= {each.folder.model.resolve(), *(file.resolve() for _, file in each.folder.files)}
    if any(file.is_relative_to(output) for file in sources):
        raise ConfigurationError(
            f"{output} contains the files to import, or the weights, and would be replaced.",
            hint="Choose a different folder.",
        )
    if not self_contained and not tower.complete:
        raise ConfigurationError(
            f"{tower.checkpoint.folder} does not contain all the vision weights, so a bundle cannot refer to it.",
            hint="Add --self-contained, or pass the whole checkpoint.",
        )
    with appearing(output, force=force) as folder:
        digest = _digest(tower, weights, tell)
        shared: list[Path] = []
        if self_contained:
            write_description(tower, folder)
            part = next((each.part for each in found if each.part is not None), None)
            _write_weights(tower, part, weights, folder)
            shared = sorted(folder.iterdir())
        entries = [
            _write_program(tower, each, request.precision, folder, tell)
            for each, request in zip(found, requests, strict=True)
        ]
        checkpoint = None if self_contained else external_checkpoint(tower, source, revision)
        write_manifest(folder, new_manifest(folder, tower, digest, shared, entries, checkpoint))
    warnings = dict.fromkeys(warning for each in found for warning in each.warnings)
    return Imported(open_bundle(output, checkpoint=tower.checkpoint), tuple(warnings))


def _check_together(found: Sequence[Findings]) -> None:
    """Refuse artifacts that are for the same grid, or that differ in the host's weights."""
    if not found:
        raise ConfigurationError("no folder to import was given.", hint="Pass a folder that the compiler wrote.")
    artifacts: dict[Grid, Path] = {}
    first: tuple[Path, HostPart] | None = None
    for each in found:
        if each.grid in artifacts:
            raise ConfigurationError(
                f"{artifacts[each.grid]} and {each.folder.artifact} are both for grid {each.grid.h}x{each.grid.w}.",
                hint="Import one of them.",
            )
        artifacts[each.grid] = each.folder.artifact
        if each.part is None:
            continue
        model, part = first = first or (each.folder.model, each.part)
        if any(not np.array_equal(values, part.weights[name]) for name, values in each.part.weights.items()):
            raise BundleError(
                f"{model} and {each.folder.model} contain different patch embeddings.",
                hint="Import artifacts of one checkpoint that were exported in the same way.",
            )


def _digest(tower: Tower, weights: Mapping[str, StoredTensor], tell: Progress) -> str:
    """Digest of the vision weights; if they were stripped, from the note that `visionaccel strip` left."""
    if tower.complete:
        total = sum(tensor.length for tensor in weights.values())
        return tower_digest(tower, progress=counter("digest of the weights", total, tell))
    noted = None if tower.stored_names else read_strip_note(tower.checkpoint.folder)
    if noted is None:
        raise ConfigurationError(
            f"{tower.checkpoint.folder} contains neither all the vision weights nor a note of `visionaccel strip` with "
            "their digest.",
            hint="Pass the whole checkpoint, or one that `visionaccel strip` wrote.",
        )
    return noted


def _write_weights(tower: Tower, part: HostPart | None, weights: Mapping[str, StoredTensor], folder: Path) -> None:
    """Write the host's weights: the artifact's, or the checkpoint's if the artifact's were not recognised."""
    named: dict[str, StoredTensor] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in tower.host_weights:
            if part is not None:
                values, file = narrowest(part.weights[name]), Path(work, f"{len(named)}")
                values.tofile(file)
                named[name] = StoredTensor(name, file, 0, values.nbytes, values.dtype.name, values.shape)
            elif name in weights:
                named[name] = weights[name]
            else:
                raise ConfigurationError(
                    f"{tower.checkpoint.folder} lacks {name}, and it was not found in the artifact either.",
                    hint="Pass the whole checkpoint.",
                )
        packed = {tower.stored_name(name): tensor for name, tensor in named.items()}
        write_safetensors(folder / SINGLE_FILE, packed, metadata={"format": "pt"})


def _write_program(tower: Tower, found: Findings, precision: Precision, folder: Path, tell: Progress) -> dict[str, Any]:
    coverage = FixedGrid(found.grid)
    name = program_name(coverage)
    home = folder / name
    home.mkdir()
    files = [home / path for path, _ in found.folder.files]
    # ONNX Runtime refuses external data that is a hard link.
    _bring(home, found.folder.files, link=found.folder.format != EP_CONTEXT, tell=tell)
    companions: dict[str, Path] = {}
    inputs, outputs = tower.signature(coverage, found.split)
    if found.split is not None:
        assert found.part is not None
        stored = {inputs[0].name: found.part.input.name, outputs[0].name: found.part.output.name}
    else:
        stored = _ends(found, inputs, outputs)
        if found.folder.format == EP_CONTEXT:
            # A backend opens only the files that are listed as companions.
            companions = {path: home / path for path, file in found.folder.files if file != found.folder.artifact}
        else:
            assert found.boundary is not None
            companions = _write_host(found.graph, found.boundary, home)
    main = next(path for path, file in found.folder.files if file == found.folder.artifact)
    return {
        "name": name,
        "format": found.folder.format,
        "model": (home / main).relative_to(folder).as_posix(),
        "files": [stated_file(folder, file) for file in dict.fromkeys([*files, *companions.values()])],
        "companions": {role: file.relative_to(folder).as_posix() for role, file in companions.items()},
        "inputs": [_stated_tensor(spec, stored[spec.name]) for spec in inputs],
        "outputs": [_stated_tensor(spec, stored[spec.name]) for spec in outputs],
        "coverage": stated_coverage(coverage).model_dump(mode="json"),
        "precision": precision,
        "device": found.folder.device,
        "host": None if found.split is None else {"order": found.split.order, "tensors": list(tower.host_weights)},
    }


def _stated_tensor(spec: TensorSpec, stored: str) -> dict[str, Any]:
    return {**asdict(spec), "stored_name": None if stored == spec.name else stored}


def _ends(found: Findings, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> dict[str, str]:
    """Return the names of the graph's input and output; BundleError if their declared shapes do not fit the grid."""
    stored = {}
    for wanted, stated in ((inputs, found.graph.inputs), (outputs, found.graph.outputs)):
        if len(wanted) != 1 or len(stated) != 1:
            raise BundleError(
                f"{found.graph.path}: the model has {len(found.graph.inputs)} inputs and {len(found.graph.outputs)} "
                "outputs; a tower of one grid has one each.",
                hint=EXPORT_AGAIN,
            )
        known = zip(wanted[0].shape, stated[0].shape, strict=False)
        differ = any(isinstance(size, int) and size != expected for expected, size in known)
        if differ or len(stated[0].shape) != len(wanted[0].shape) or stated[0].dtype != wanted[0].dtype:
            raise BundleError(
                f"{found.graph.path}: the model has {stated[0]}, but a program for grid {found.grid.h}x{found.grid.w} "
                f"has {wanted[0]}.",
                hint="Pass the grid and the checkpoint that it was compiled for.",
            )
        stored[wanted[0].name] = stated[0].name
    return stored


def _write_host(graph: OnnxGraph, boundary: Boundary, home: Path) -> dict[str, Path]:
    before, after = extract_host(graph, boundary)
    shapes = [spec.shape for spec in (*boundary.inputs, *boundary.outputs)]
    if not all(shapes) or any(isinstance(size, str) for shape in shapes for size in shape):
        raise BundleError(
            f"{graph.path}: the shapes of the device's tensors are unknown.",
            hint="Add the compiler's flexmlrt-hsi.json to the folder.",
        )
    written = {}
    contents = {
        f"{HOST_BEFORE}.onnx": before, f"{HOST_AFTER}.onnx": after, f"{DEVICE_TENSORS}.json": as_json(asdict(boundary)),
    }  # fmt: skip
    for name, data in contents.items():
        if data is None:
            continue
        role = name.partition(".")[0]
        written[role] = home / name
        if written[role].exists():
            raise BundleError(f"one of the artifact's files is named {name}.", hint="Rename that file.")
        write_file(written[role], data)
    return written


def _bring(home: Path, files: Iterable[tuple[str, Path]], *, link: bool, tell: Progress) -> None:
    """Link files into the program's folder, or copy them if links are not wanted or not possible."""
    left: list[tuple[Path, Path]] = []
    for path, file in files:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        if link:
            with suppress(OSError):
                os.link(file.resolve(), home / path)
                continue
        left.append((file, home / path))
    needed = sum(file.stat().st_size for file, _ in left)
    hint = "Free some space, or write the bundle to the artifact's own disk."
    require_space(home.parent.parent, needed, "the artifact", hint)
    count = counter("artifact", needed, tell)
    for file, target in left:
        count(0)
        shutil.copyfile(file, target)
        count(file.stat().st_size)
