"""Copies checkpoints without their vision weights, for a language model's server with a separate encoder.

A copy contains the digest of the removed weights, so that the encoder that belongs to it can be recognised.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from visionaccel.bundle.folder import appearing, as_json, require_space, write_file
from visionaccel.checkpoint import INDEX_FILE, Checkpoint, read_json, weights_digest, write_safetensors
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import CheckpointError, ConfigurationError
from visionaccel.families import tower_of

STRIP_NOTE = "visionaccel_stripped.json"
"""The file in a stripped checkpoint's folder with the digest of the removed weights."""

_DIGEST_KEY = "vision_weights_digest"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_WEIGHT_ENDINGS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".index.json",
    ".onnx", ".onnx.data", ".onnx_data",
)  # fmt: skip
"""Files with weights, indexes of such files, and ONNX graphs, which may refer to bytes of the original shards."""


@dataclass(frozen=True, slots=True)
class StripReport:
    """What `strip_checkpoint` wrote. Sizes include only tensors.

    Attributes:
        vision_weights_digest: `weights_digest` of the vision weights, by their names without the checkpoint's prefix.
        shards: Names of the written safetensors files.
        skipped: Paths in the checkpoint's folder that were not copied: hidden ones, and weights in other files and
            formats. Folders end with a slash.
    """

    folder: Path
    family: str
    vision_weights_digest: str
    bytes_before: int
    bytes_after: int
    removed_tensors: int
    kept_tensors: int
    shards: tuple[str, ...]
    skipped: tuple[str, ...]


def strip_checkpoint(
    checkpoint: Checkpoint, out: Path, *, progress: Callable[[int], None] | None = None
) -> StripReport:
    """Copy a checkpoint without its vision weights.

    Tensors are streamed and keep their bytes, dtypes, names, shards and the shards' `__metadata__`; the index is
    rewritten. Other files are copied, with symbolic links resolved, except hidden files and other files with weights,
    which could contain the vision tower too.

    Args:
        checkpoint: The checkpoint; its folder is only read.
        out: A new folder, which appears complete or not at all; missing parents are made.
        progress: Called with the number of bytes just read; the total is that of all tensors of the checkpoint.

    Raises:
        ConfigurationError: If `out` exists, is in the checkpoint's folder or cannot be written, or the disk is too
            full.
        CheckpointError: If the checkpoint is damaged, or has no vision weights or nothing else.
        ChangedFileError: If its weights change while they are copied.
        UnsupportedArchitectureError: If its vision tower belongs to an unknown family.
    """
    with _errors_of_copying(checkpoint, out):
        out = _free_place(checkpoint, out)
        tower = tower_of(checkpoint)
        removed = tower.stored_names
        if not removed:
            raise CheckpointError(
                f"{checkpoint.folder} has no vision weights to strip.",
                hint="Use it as it is, and set VISIONACCEL_BUNDLE to a folder that has the vision weights.",
            )
        kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in removed}
        if not kept:
            raise CheckpointError(
                f"{checkpoint.folder} has only vision weights: nothing would be left.",
                hint="Strip a checkpoint that has a language model.",
            )
        vision = tower.weights
        before, after = _bytes(checkpoint.tensors.values()), _bytes(kept.values())
        files, skipped = _other_files(checkpoint)
        sources = [*files.values(), *checkpoint.files]
        needed = sum(source.stat().st_size for source in sources) - (before - after)
        parent = next(folder for folder in out.parents if folder.exists())
        require_space(parent, needed, "the stripped checkpoint", "Free some space, or write to another disk.")
        _require_one_content(checkpoint)
        with appearing(out) as partial, _errors_of_copying(checkpoint, out):
            digest = weights_digest(vision, progress)
            shards = _write_shards(checkpoint, partial, removed, progress)
            for name, source in files.items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, partial / name)
            write_file(partial / STRIP_NOTE, as_json({"family": tower.family, _DIGEST_KEY: digest}))
    return StripReport(
        folder=out,
        family=tower.family,
        vision_weights_digest=digest,
        bytes_before=before,
        bytes_after=after,
        removed_tensors=len(removed),
        kept_tensors=len(kept),
        shards=shards,
        skipped=skipped,
    )


def read_strip_note(folder: Path) -> str | None:
    """Return the `weights_digest` of the vision weights removed from a checkpoint; None if it was not stripped.

    Raises:
        CheckpointError: If the note exists but cannot be read.
    """
    path = folder / STRIP_NOTE
    if not (path.exists() or path.is_symlink()):
        return None
    digest = read_json(path).get(_DIGEST_KEY)
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise CheckpointError(
            f"{path} has no valid {_DIGEST_KEY}: it must be sha256: followed by 64 hexadecimal digits.",
            hint="Strip the original checkpoint again.",
        )
    return digest


@contextmanager
def _errors_of_copying(checkpoint: Checkpoint, out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{checkpoint.folder} cannot be copied to {out}: {error}",
            hint="Check permissions and free space, and that nothing else writes there.",
        ) from error


def _free_place(checkpoint: Checkpoint, out: Path) -> Path:
    """Return `out` with symbolic links resolved, if nothing exists there."""
    if out.exists() or out.is_symlink():
        raise ConfigurationError(
            f"{out} already exists.", hint="Choose a folder that does not exist, or remove this one."
        )
    out = out.resolve()
    if out.is_relative_to(checkpoint.folder.resolve()):
        raise ConfigurationError(f"{out} is inside the checkpoint's folder.", hint="Choose a folder outside it.")
    return out


def _require_one_content(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with two copies of the weights that differ, since either may be out of date."""
    for name, copy in checkpoint.second_copy.items():
        if not checkpoint.tensors[name].holds_the_same_as(copy):
            raise CheckpointError(
                f"{copy.file} and the shards in {INDEX_FILE} contain {name!r} with different values.",
                hint="Remove the file that is out of date.",
            )


def _other_files(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return the files to copy by their path in the folder, and the paths of the others."""
    written = {STRIP_NOTE, *(file.name for file in checkpoint.files)}
    if checkpoint.weight_map is not None:
        written.add(INDEX_FILE)
    entries = [(name, source) for name, source in _walk(checkpoint.folder) if name not in written]
    files = {name: source for name, source in entries if source is not None}
    return files, tuple(name for name, source in entries if source is None)


def _walk(folder: Path, below: str = "", within: frozenset[Path] = frozenset()) -> Iterator[tuple[str, Path | None]]:
    """Yield each file below `folder` with its path there; None instead of the file if it is not to be copied."""
    resolved = folder.resolve()
    if resolved in within:
        raise CheckpointError(f"{folder} is a link to a folder that contains it.", hint="Remove the link.")
    for entry in sorted(folder.iterdir()):
        name = below + entry.name
        hidden = entry.name.startswith(".")
        if entry.is_dir() and not hidden:
            yield from _walk(entry, f"{name}/", within | {resolved})
        elif entry.is_dir():
            yield f"{name}/", None
        elif hidden or entry.name.lower().endswith(_WEIGHT_ENDINGS):
            yield name, None
        elif entry.is_symlink() and not entry.exists():
            raise CheckpointError(f"{entry} is a broken link.", hint="Download the file again, or remove the link.")
        else:
            yield name, entry if entry.is_file() else None


def _write_shards(
    checkpoint: Checkpoint, out: Path, removed: frozenset[str], progress: Callable[[int], None] | None
) -> tuple[str, ...]:
    """Write the shards with remaining tensors, and the index if there is one; return the names of the shards."""
    written = []
    for shard, (tensors, metadata) in checkpoint.headers.items():
        left = {name: tensor for name, tensor in tensors.items() if name not in removed}
        if left:
            write_safetensors(out / shard.name, left, metadata=metadata, progress=progress)
            written.append(shard.name)
    if checkpoint.weight_map is not None:
        index = read_json(checkpoint.folder / INDEX_FILE)
        totals = dict(index["metadata"]) if isinstance(index.get("metadata"), dict) else {}
        totals["total_size"] = _bytes(tensor for name, tensor in checkpoint.tensors.items() if name not in removed)
        if isinstance(totals.get("total_parameters"), int):
            totals["total_parameters"] -= sum(math.prod(checkpoint.tensors[name].shape) for name in removed)
        shards = checkpoint.weight_map.items()
        named = {name: shard for name, shard in shards if name not in removed and shard in written}
        write_file(out / INDEX_FILE, as_json({**index, "weight_map": named, "metadata": totals}))
    return tuple(written)


def _bytes(tensors: Iterable[StoredTensor]) -> int:
    return sum(tensor.length for tensor in tensors)
