"""Golden images of a bundle: patches with the embeddings that the float32 reference computes for them.

`visionaccel validate` writes them with the certificate, and a canary encodes them on a device before the device serves
requests. They are stored as patches rather than pictures, so that they test only the encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from visionaccel.bundle.bundle import Bundle
from visionaccel.bundle.folder import replace_file, stated_file, write_manifest
from visionaccel.checkpoint import read_header
from visionaccel.core.digests import file_digest
from visionaccel.core.grid import Grid, as_grids, total_patches
from visionaccel.core.invalid_values import problems_of
from visionaccel.core.memory_files import FileState, changed_file, when_steady
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import BundleError, CheckpointError, GridError

GOLDEN_FILE = "golden.safetensors"
"""The file's name in the bundle's folder."""

_KEY = "golden"
_MOST, _MOST_BYTES = 256, 2**30
_AGAIN = "Run `visionaccel validate` again."


@dataclass(frozen=True, eq=False)
class Golden:
    """One encode with a known result.

    Attributes:
        name: A description of its content and grids.
        program: The name of the program that it was chosen for.
        grids: The grids of the call.
        patches: float32 [P, patch_width], read-only.
        embeddings: float32 [N, out_width], from the reference, read-only.
        threshold: The lowest cosine of a token that passes, as in the certificate.
    """

    name: str
    program: str
    grids: tuple[Grid, ...]
    patches: NDArray[np.float32]
    embeddings: NDArray[np.float32]
    threshold: float


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(max_length=256)
    program: str = Field(max_length=256)
    grids: tuple[tuple[int, int, int], ...] = Field(min_length=1, max_length=64)
    threshold: float = Field(gt=0, le=1)


_ENTRIES = TypeAdapter(list[_Entry])


def write_golden(bundle: Bundle, images: Sequence[Golden], changes: Mapping[str, Any]) -> Bundle:
    """Replace the golden images of a bundle, and other fields of its manifest, such as the certificate.

    Returns the changed bundle.

    Raises:
        BundleError: If the result is not a valid manifest.
        ConfigurationError: If the folder cannot be written.
    """
    from safetensors.numpy import save

    stated, path = bundle.manifest.model_dump(mode="json"), bundle.folder / GOLDEN_FILE
    kept = [file for file in stated["files"] if file["path"] != GOLDEN_FILE]
    entries, tensors = [], {}
    for number, each in enumerate(images):
        tensors[f"{number}.patches"] = np.ascontiguousarray(each.patches, np.float32)
        tensors[f"{number}.embeddings"] = np.ascontiguousarray(each.embeddings, np.float32)
        grids = tuple(grid.thw for grid in each.grids)
        entries.append(_Entry(name=each.name[:256], program=each.program, grids=grids, threshold=each.threshold))
    if kept != stated["files"]:  # otherwise the bundle could not be opened if this ended after the file was replaced
        write_manifest(bundle.folder, {**stated, "files": kept})
    if images:
        replace_file(path, save(tensors, {_KEY: _ENTRIES.dump_json(entries).decode()}))
        kept.append(stated_file(bundle.folder, path))
    manifest = write_manifest(bundle.folder, {**stated, **changes, "files": kept})
    if not images:
        with suppress(OSError):  # the manifest no longer lists it, so it is not read
            path.unlink(missing_ok=True)
    return Bundle(bundle.folder, manifest, bundle.tower)


def read_golden(bundle: Bundle) -> tuple[Golden, ...]:
    """Read the golden images of a bundle, which may have none.

    Raises:
        BundleError: If they are malformed or do not fit the bundle's tower.
        ChangedFileError: If the file changed since the bundle was opened.
    """
    stated = next((file for file in bundle.manifest.files if file.path == GOLDEN_FILE), None)
    if stated is None:
        return ()
    return when_steady(lambda: _read(bundle, bundle.folder / GOLDEN_FILE, stated.sha256))


def _read(bundle: Bundle, path: Path, digest: str) -> tuple[Golden, ...]:
    before = FileState.of_named(path)
    if file_digest(path) != digest:
        raise changed_file(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        tensors, metadata = read_header(path)
        entries = _ENTRIES.validate_json(metadata.get(_KEY, ""))
        if len(entries) > _MOST:
            raise ValueError(f"it has {len(entries)} images; at most {_MOST} are supported")
        images = tuple(_images(bundle, tensors, entries))
    except (ValidationError, CheckpointError, GridError, OSError, ValueError) as error:
        raise BundleError(
            f"{path} contains no valid golden images for this bundle: {problems_of(error)}", hint=_AGAIN
        ) from error
    before.require(path)
    return images


def _images(bundle: Bundle, tensors: Mapping[str, StoredTensor], entries: Sequence[_Entry]) -> Iterator[Golden]:
    tower = bundle.tower
    for number, entry in enumerate(entries):
        grids = as_grids(entry.grids, tower.merge_size)
        tokens = sum(grid.tokens(tower.merge_size) for grid in grids)
        expected = {"patches": (total_patches(grids), tower.patch_width), "embeddings": (tokens, tower.out_width)}
        arrays = {}
        for what, shape in expected.items():
            stored = tensors.get(f"{number}.{what}")
            if stored is None:
                raise ValueError(f"it has no {what} of {entry.name!r}")
            if (stored.shape, stored.dtype) != (shape, "float32"):
                raise ValueError(
                    f"its {what} of {entry.name!r} are {stored.dtype} {list(stored.shape)}, not float32 {list(shape)}"
                )
            arrays[what] = stored.read()
            arrays[what].flags.writeable = False
            if not np.isfinite(arrays[what]).all():
                raise ValueError(f"its {what} of {entry.name!r} contain NaN or infinity")
        yield Golden(entry.name, entry.program, grids, arrays["patches"], arrays["embeddings"], entry.threshold)
