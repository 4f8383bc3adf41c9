"""Writing a bundle from a checkpoint: weights are streamed, graphs are written, and the manifest comes last."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from visionaccel import __version__
from visionaccel.bundle.manifest import MANIFEST, MOST_PATCHES, SCHEMA_VERSION, seal, stated_coverage
from visionaccel.bundle.opening import Bundle, open_bundle, tower_digest
from visionaccel.bundle.processor import PROCESSOR_FILES, processor_digest
from visionaccel.checkpoint import SINGLE_FILE, Checkpoint, write_safetensors
from visionaccel.core.digests import file_digest
from visionaccel.core.dtypes import DTYPES
from visionaccel.core.orphans import guarded_folder
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

__all__ = [
    "WEIGHT_PREFIX", "Progress", "ProgramRequest", "appearing", "as_json", "counter", "export_bundle",
    "external_checkpoint", "program_name", "rewrite_manifest", "stated_file", "toolchain", "write_description",
    "write_file", "write_manifest",
]  # fmt: skip

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much it is in all: bytes of weights, or programs."""

WEIGHT_PREFIX = "visual."
"""What the names of packed weights start with."""

_TOOLS = ("onnx", "numpy", "ml_dtypes")


@dataclass(frozen=True, slots=True)
class ProgramRequest:
    """A program to write.

    Attributes:
        coverage: Which grids it takes.
        split_host: Leave the patch embedding and the window reorder to the host; fixed shapes only.
        dialect: Whose operators; None for standard ones in a program of fixed shapes, else ONNX Runtime's own.
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
        tower: Where the weights are.
        output: The folder to write; it appears whole or not at all.
        requests: The programs, the preferred first.
        source: Where users find the checkpoint again: a folder or a Hugging Face repository. Default: its folder.
        revision: That repository's revision.
        self_contained: Pack the weights into the bundle, in `precision`; otherwise they stay in the checkpoint.
        precision: Dtype of the programs' weights and activations.
        device: Kind of device that the programs are for; None for any.
        companions: JSON files that a backend needs beside each program, such as a compiler's configuration, by their
            role; `NAME.json` is written for role `NAME`.
        force: Replace an existing bundle.
        progress: Told how far it is.

    Raises:
        ConfigurationError: If there is nothing to write, two requests are for one coverage, one is for several frames
            or too many patches, or `output` exists, cannot be written, or holds the weights that it would refer to.
        CheckpointError: If a weight is missing or does not fit the configuration or the precision.
    """
    tell = progress or (lambda *_: None)
    names = [program_name(request.coverage) for request in requests]
    if not requests or len(set(names)) != len(names):
        raise ConfigurationError(
            "the programs to write are none, or one of them twice.", hint="Name each grid, bucket or --dynamic once."
        )
    for request in requests:
        _check_size(request.coverage)
    if device is not None and not device.isidentifier():
        raise ConfigurationError(
            f"{device!r} is no kind of device.", hint="Name the kind alone, such as npu; which one is chosen at start."
        )
    output = Path(os.path.realpath(output))  # through a link, the bundle that it leads to is replaced
    if not self_contained and any(tensor.file.is_relative_to(output) for tensor in tower.weights.values()):
        raise ConfigurationError(
            f"{output} holds the weights themselves, and would be replaced by references to them.",
            hint="Name another folder, or pack the weights with --self-contained.",
        )
    total = sum(tensor.length for tensor in tower.weights.values())
    with appearing(output, force=force) as folder:
        digest = tower_digest(tower, progress=counter("digest of the weights", total, tell))
        files: list[Path] = []
        if self_contained:
            packed = _pack(tower, folder, precision, total, tell)
            files = sorted(folder.iterdir())
        else:
            packed = tower
        beside = {role: folder / f"{role}.json" for role in companions or {}}
        for role, data in (companions or {}).items():
            write_file(beside[role], data)
        entries = []
        for number, (request, name) in enumerate(zip(requests, names, strict=True)):
            tell("programs", number, len(requests))
            entries.append(_write_program(packed, folder, name, request, precision, device, beside))
        tell("programs", len(requests), len(requests))
        checkpoint = None if self_contained else external_checkpoint(tower, source, revision)
        write_manifest(folder, tower, digest, files, entries, checkpoint)
    return open_bundle(output, checkpoint=tower.checkpoint)


def external_checkpoint(tower: Tower, source: str | None, revision: str | None) -> dict[str, Any]:
    """The manifest's word of the checkpoint that holds a bundle's weights."""
    return {"source": source or str(tower.checkpoint.folder.absolute()), "revision": revision}


def write_manifest(
    folder: Path,
    tower: Tower,
    digest: str,
    files: Iterable[Path],
    programs: Sequence[Mapping[str, Any]],
    checkpoint: Mapping[str, Any] | None,
) -> None:
    """Seal what was written into a bundle's folder.

    Args:
        folder: The folder.
        tower: The tower that the programs compute.
        digest: Digest of its weights.
        files: Files that all programs share.
        programs: The manifest's entries of the programs.
        checkpoint: As `external_checkpoint`; None for a bundle that holds the weights.

    Raises:
        BundleError: If the result is no manifest.
    """
    manifest = seal(
        {
            "schema_version": SCHEMA_VERSION,
            "family": tower.family,
            "spec": tower.spec.document(),
            "weights_digest": digest,
            "processor_digest": processor_digest(tower.checkpoint.folder),
            "checkpoint": checkpoint,
            "files": [stated_file(folder, file) for file in files],
            "programs": programs,
            "toolchain": toolchain(_TOOLS),
            "certificate": None,
        }
    )
    write_file(folder / MANIFEST, as_json(manifest.model_dump(mode="json")))


def program_name(coverage: Coverage) -> str:
    """The name of an exported program: `58x74`, `bucket-4292x80` or `dynamic`."""
    match coverage:
        case FixedGrid(grid=grid):
            return f"{grid.h}x{grid.w}"
        case Bucket(sizes=sizes):
            return "bucket-" + "x".join(map(str, sizes.values()))
        case AnyGrid():
            return "dynamic"


def toolchain(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of visionaccel, Python and those of `distributions` that are installed."""
    found = {"visionaccel": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def rewrite_manifest(bundle: Bundle, changes: Mapping[str, Any]) -> Bundle:
    """The bundle with some fields of its manifest changed, such as the certificate, and sealed anew.

    Raises:
        BundleError: If the result is no manifest.
        ConfigurationError: If the folder cannot be written.
    """
    document = {**bundle.manifest.model_dump(mode="json"), **changes}
    manifest = seal(document)
    target = bundle.folder / MANIFEST
    partial = target.with_name(f".{MANIFEST}.partial")
    try:
        write_file(partial, as_json(manifest.model_dump(mode="json")))
        partial.replace(target)
    except OSError as error:
        raise ConfigurationError(f"{target} cannot be written: {error}", hint="Copy the bundle elsewhere.") from error
    return Bundle(bundle.folder, manifest, bundle.tower)


def _check_size(coverage: Coverage) -> None:
    match coverage:
        case FixedGrid(grid=grid):
            frames, patches = grid.t, grid.patches
        case Bucket(patches=patches):
            frames = 1
        case AnyGrid():
            return
    if frames != 1 or patches > MOST_PATCHES:
        raise ConfigurationError(
            f"a program of fixed shapes takes one frame of at most {MOST_PATCHES} patches, not {coverage} "
            f"with {patches} patches in {frames} frames.",
            hint="Name a smaller grid, or write a program for any grid.",
        )


@contextmanager
def appearing(output: Path, *, force: bool) -> Iterator[Path]:
    """A folder beside `output` that takes its place in the end, and leaves no trace if anything fails before.

    A bundle that is there already is moved aside first and deleted last, so that there is always the old one, none, or
    the new one.
    """
    try:
        _check_replaceable(output, force=force)
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        aside = folder.with_name(folder.name.replace(".partial-", ".replaced-"))
        try:
            with guarded_folder(folder):
                yield folder
                folder.chmod(0o755)
                _sync(folder)
            _check_replaceable(output, force=force)  # it may have appeared meanwhile
            if output.exists():
                output.rename(aside)
            folder.rename(output)
            _sync(output.parent)
        except BaseException:
            if aside.exists() and not output.exists():
                aside.rename(output)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise ConfigurationError(
            f"{output} cannot be written: {error}", hint="Choose a folder with enough space that may be written."
        ) from error


def _check_replaceable(output: Path, *, force: bool) -> None:
    if output.exists() and not force:
        raise ConfigurationError(f"{output} exists.", hint="Pass --force to replace it.")
    if output.exists() and not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"{output} exists and is no bundle.", hint="Name another folder.")


def _pack(tower: Tower, folder: Path, precision: Precision, total: int, tell: Progress) -> Tower:
    """Configuration, processor and weights into the folder; the tower over them."""
    needed = sum(math.prod(tensor.shape) for tensor in tower.weights.values()) * DTYPES[precision].bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigurationError(
            f"the weights need {needed / 2**30:.2f} GiB, and {folder.parent} has {free / 2**30:.2f} GiB left.",
            hint="Free some space, or leave the weights in the checkpoint.",
        )
    named = {WEIGHT_PREFIX + name: tensor for name, tensor in tower.weights.items()}
    write_safetensors(
        folder / SINGLE_FILE,
        named,
        dtype=precision,
        metadata={"format": "pt"},
        progress=counter("weights", total, tell),
    )
    write_description(tower, folder)
    return tower_of(Checkpoint(folder))


def write_description(tower: Tower, folder: Path) -> None:
    """Write what says which tower it is and what makes its patches: configuration and image processor."""
    write_file(folder / "config.json", as_json(tower.description))
    for name in PROCESSOR_FILES:
        if (tower.checkpoint.folder / name).exists():
            write_file(folder / name, (tower.checkpoint.folder / name).read_bytes())


def counter(stage: str, total: int, tell: Progress) -> Callable[[int], None]:
    """A function that adds up pieces and tells the sum."""
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
    model = tower.onnx_model(coverage=request.coverage, precision=precision, host=split, dialect=request.dialect)
    path = folder / f"{name}.onnx"
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


def stated_file(folder: Path, path: Path) -> dict[str, Any]:
    """A file of a bundle in `folder` as the manifest states it."""
    return {
        "path": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": file_digest(path, trust_unchanged=False),
    }


def as_json(value: Mapping[str, Any]) -> bytes:
    """An object as the text of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make a renaming durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
