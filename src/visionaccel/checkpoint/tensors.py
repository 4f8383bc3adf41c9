"""Digests, copies, conversions and comparisons of tensors in safetensors files.

Weights are streamed in pieces of about `CHUNK_BYTES`, so memory does not grow with a tensor or a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from visionaccel.core.bounded_files import MOST_HOLE_BYTES, hole_bytes
from visionaccel.core.dtypes import DTYPES, FLOATS, OF_SAFETENSORS, safetensors_name
from visionaccel.core.memory_files import MemoryFile
from visionaccel.core.stored_tensor import CHUNK_BYTES, StoredTensor, rounded
from visionaccel.errors import CheckpointError, ConfigurationError

_TARGETS = ("float32", "bfloat16", "float16")


def weights_digest(tensors: Mapping[str, StoredTensor], progress: Callable[[int], None] | None = None) -> str:
    """Return a digest that is equal for equal names, dtypes, shapes and bytes, in any files.

    It is `sha256:` and the SHA-256 over the tensors in the order of their names. Each adds its name, dtype, shape
    (`3,224,224`, empty for a scalar) and number of bytes, as UTF-8 text with the text's length before it (8 bytes,
    little-endian), and then its bytes.

    Args:
        tensors: The tensors by name, usually without the checkpoint's prefix, so that the digest does not depend on it.
        progress: Called with the number of bytes just read.

    Raises:
        CheckpointError: If a file cannot be read, ends too early, or has more than `MOST_HOLE_BYTES` of the tensors in
            holes.
    """
    digest = hashlib.sha256()
    for _, piece in _hashed(tensors, digest):
        if progress is not None:
            progress(len(piece))
    return f"sha256:{digest.hexdigest()}"


def copy_to_memory(tensors: Mapping[str, StoredTensor], copied: MemoryFile | None = None) -> dict[str, StoredTensor]:
    """Copy tensors into one sealed memory file in the safetensors format, and return the copies by the same names.

    They are read once: the memory file's digest is the `weights_digest` of the bytes that were copied. If `copied` is
    given, it holds them already and nothing is read. Each copy keeps the memory file alive.

    Raises:
        CheckpointError: If a file cannot be read or ends too early.
        ConfigurationError: If there is not enough memory.
    """
    header, starts = _laid_out(tensors)

    def fill(file: BinaryIO) -> str:
        digest, places = hashlib.sha256(), dict(starts)
        file.write(header)
        for name, piece in _hashed(tensors, digest):
            file.seek(places[name])
            file.write(piece)
            places[name] += len(piece)
        return f"sha256:{digest.hexdigest()}"

    size = len(header) + sum(tensor.length for tensor in tensors.values())
    memory = copied or MemoryFile.write("visionaccel-weights", size, fill)
    return {
        name: replace(tensor, file=memory.path, offset=starts[name], origin=memory) for name, tensor in tensors.items()
    }


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write tensors into one new safetensors file.

    Args:
        path: The file to write. It must not exist, since it could be one of the sources. If anything fails, it is
            removed.
        tensors: The tensors by the names that they get.
        dtype: `float32`, `bfloat16` or `float16`: float64, float32, bfloat16 and float16 tensors are rounded to it, to
            nearest with ties to even, float64 by way of float32, as in torch. Tensors of other dtypes (8-bit floats
            too, which mean nothing without their scales) are copied unchanged. None to copy all of them unchanged.
        metadata: The file's `__metadata__`.
        progress: Called with the number of bytes just read.

    Raises:
        CheckpointError: If a source cannot be read or ends too early, or a finite value becomes infinite in `dtype`.
        ConfigurationError: If `path` exists or cannot be written, or `dtype` is not supported.
    """
    if dtype is not None and dtype not in _TARGETS:
        raise ConfigurationError(
            f"weights cannot be converted to {dtype!r}.", hint=f"Choose one of {', '.join(_TARGETS)}."
        )
    targets = {name: dtype if dtype and tensor.dtype in FLOATS else tensor.dtype for name, tensor in tensors.items()}
    header, starts = _laid_out({name: _converted(tensor, targets[name]) for name, tensor in tensors.items()}, metadata)
    try:
        with path.open("xb") as file:
            try:
                file.write(header)
                for name in starts:
                    for read, piece in _pieces(tensors[name], targets[name]):
                        file.write(piece)
                        if progress is not None:
                            progress(read)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error}", hint="Choose a new file in a folder with enough space."
        ) from error


def differing_weights(packed: Mapping[str, StoredTensor], source: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Return the names of weights that only one side has, or that are not the source's rounded to the packed dtype.

    Comparing embeddings does not replace this: a missing small bias can change them by less than bfloat16's rounding.

    Raises:
        CheckpointError: If a file cannot be read or ends too early.
    """
    names = sorted(set(packed) | set(source))
    return tuple(n for n in names if n not in packed or n not in source or not _same(packed[n], source[n]))


def _same(packed: StoredTensor, source: StoredTensor) -> bool:
    if packed.shape != source.shape:
        return False
    if packed.dtype == source.dtype or packed.dtype not in FLOATS or source.dtype not in FLOATS:
        return packed.holds_the_same_as(source)
    pairs = zip(packed.elements(CHUNK_BYTES), source.elements(CHUNK_BYTES), strict=True)
    return all(rounded(theirs, packed.dtype).tobytes() == ours.tobytes() for ours, theirs in pairs)


def _hashed(tensors: Mapping[str, StoredTensor], digest: hashlib._Hash) -> Iterator[tuple[str, memoryview]]:
    """Yield each piece with the name of its tensor, and update `digest` as `weights_digest` describes."""
    _refuse_holes(tensors)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for name, tensor in sorted(tensors.items()):
        for text in (name, tensor.dtype, ",".join(map(str, tensor.shape)), str(tensor.length)):
            # JSON headers can hold unpaired surrogates, which plain UTF-8 cannot.
            field = text.encode("utf-8", "surrogatepass")
            digest.update(len(field).to_bytes(8, "little") + field)
        for piece in tensor.chunks(buffer):
            digest.update(piece)
            yield name, piece


def _refuse_holes(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse tensors that take almost no disk space and hours to read."""
    holes = 0
    for tensor in tensors.values():
        try:
            holes += hole_bytes(tensor.file, tensor.offset, tensor.offset + tensor.length)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{tensor.file} cannot be read: {error}", hint="Download the file again.") from error
        if holes > MOST_HOLE_BYTES:
            raise CheckpointError(
                f"{tensor.file} is sparse: more than {MOST_HOLE_BYTES >> 30} GiB of the weights are not on the disk.",
                hint="Download the file again.",
            )


def _laid_out(
    tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """Return the bytes of a file before its first tensor, and where each tensor begins, in the order of the file.

    Tensors with the largest elements come first, as in the safetensors library, so all are aligned without gaps.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-_item_bytes(tensors[name]), name)):
        tensor = tensors[name]
        offsets[name], end = end, end + tensor.length
        place = [offsets[name], end]
        header[name] = {"dtype": safetensors_name(tensor.dtype), "shape": tensor.shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + offset for name, offset in offsets.items()}


def _item_bytes(tensor: StoredTensor) -> int:
    """Return the size of an element; for an unknown dtype it follows from the tensor's size, 0 below a byte."""
    known = OF_SAFETENSORS.get(safetensors_name(tensor.dtype))
    return tensor.length // max(1, math.prod(tensor.shape)) if known is None else known.bytes


def _converted(tensor: StoredTensor, dtype: str) -> StoredTensor:
    """Return a tensor with the dtype and length that it has after a conversion to `dtype`."""
    if dtype == tensor.dtype:
        return tensor
    return replace(tensor, dtype=dtype, length=math.prod(tensor.shape) * DTYPES[dtype].bytes)


def _pieces(tensor: StoredTensor, dtype: str) -> Iterator[tuple[int, memoryview]]:
    """Yield a tensor's bytes as `dtype` in pieces, each with the number of bytes read for it."""
    if dtype == tensor.dtype:
        for piece in tensor.chunks(memoryview(bytearray(CHUNK_BYTES))):
            yield len(piece), piece
        return
    for values in tensor.elements(CHUNK_BYTES // DTYPES[tensor.dtype].bytes):
        result = rounded(values, dtype)
        with np.errstate(all="ignore"):
            overflown = np.isfinite(values) & np.isinf(result) if not np.isfinite(result).all() else np.False_
        if overflown.any():
            raise CheckpointError(
                f"{tensor.name!r} in {tensor.file} contains {float(values[overflown][0]):g}, infinite in {dtype}.",
                hint="Keep the weights' dtype, or choose one with a larger range, such as bfloat16.",
            )
        yield values.nbytes, result.view(np.uint8).data
