"""Tensors in safetensors files as streams: their digest, and copies of them, converted on the way if wanted.

Weights pass through one buffer of `CHUNK_BYTES`, so memory does not grow with the size of a tensor or a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.bounded_files import MOST_HOLE_BYTES, hole_bytes
from visionaccel.core.dtypes import DTYPES, FLOATS, OF_SAFETENSORS, safetensors_name
from visionaccel.core.memory_files import MemoryFile
from visionaccel.core.stored_tensor import CHUNK_BYTES, StoredTensor, rounded
from visionaccel.errors import CheckpointError, ConfigurationError

_TARGETS = ("float32", "bfloat16", "float16")


def weights_digest(tensors: Mapping[str, StoredTensor], progress: Callable[[int], None] | None = None) -> str:
    """What identifies weights: equal for equal names, dtypes, shapes and bytes, in any files.

    It is the SHA-256 over the tensors in the order of their names. Each adds its name, dtype, shape (`3,224,224`, empty
    for a scalar) and number of bytes, as UTF-8 text with the text's length before it (8 bytes, little-endian), and
    then its bytes.

    Args:
        tensors: The tensors by name; name them without the checkpoint's prefix for a digest that does not depend on it.
        progress: Called with the number of bytes just read.

    Returns:
        `sha256:` and 64 hexadecimal digits.

    Raises:
        CheckpointError: If a file cannot be read or ends too early, or more than `MOST_HOLE_BYTES` of the tensors lie
            in holes.
    """

    def take(name: str, piece: memoryview) -> None:  # noqa: ARG001
        if progress is not None:
            progress(len(piece))

    return _digest(tensors, take)


def copy_to_memory(tensors: Mapping[str, StoredTensor], copied: MemoryFile | None = None) -> dict[str, StoredTensor]:
    """Copies of tensors in one sealed memory file, which is a safetensors file of them.

    They are read once: the memory file's digest is the `weights_digest` of the bytes that were copied.

    Args:
        tensors: The tensors by the names they get.
        copied: The memory file that copies of the same tensors lie in; nothing is read then.

    Returns:
        Where the copies lie, by the same names; each keeps the memory file alive, and the name that the tensor had in
        its own file.

    Raises:
        CheckpointError: If a file cannot be read or ends too early.
        ConfigurationError: If there is no memory for them.
    """
    ordered = _in_file_order(tensors, None)
    header = _header(ordered, None, None)
    starts, end = {}, len(header)
    for name, tensor in ordered.items():
        starts[name], end = end, end + tensor.length

    def fill(file: BinaryIO) -> str:
        places = dict(starts)
        _write_all(file, 0, memoryview(header))

        def take(name: str, piece: memoryview) -> None:
            _write_all(file, places[name], piece)
            places[name] += len(piece)

        return _digest(tensors, take)

    memory = copied or MemoryFile.write("visionaccel-weights", end, fill)
    return {
        name: replace(tensor, file=memory.path, offset=starts[name], origin=memory) for name, tensor in tensors.items()
    }


def _refuse_holes(tensors: Iterable[StoredTensor]) -> None:
    """Refuse tensors that take next to no space and hours to read."""
    holes = 0
    for tensor in tensors:
        try:
            holes += hole_bytes(tensor.file, tensor.offset, tensor.offset + tensor.length)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{tensor.file} cannot be read: {error}", hint="Download the file again.") from error
        if holes > MOST_HOLE_BYTES:
            raise CheckpointError(
                f"{tensor.file} is sparse: more than {MOST_HOLE_BYTES >> 30} GiB of the weights are not on the disk.",
                hint="Download the file again.",
            )


def write_safetensors(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write tensors into one safetensors file, streamed from the files they lie in.

    Args:
        path: The file to write. It must not exist, since it could be one of the sources. If anything fails, it does
            not exist afterwards either.
        tensors: The tensors by the names they get.
        dtype: `float32`, `bfloat16` or `float16`: what float64, float32, bfloat16 and float16 tensors become, rounded
            to nearest, ties to even, and float64 by way of float32, as in torch. Other dtypes (8-bit floats too, which
            mean nothing without their scales) and None: copied as they are.
        metadata: The file's `__metadata__`.
        progress: Called with the number of bytes just read.

    Raises:
        CheckpointError: If a source cannot be read or ends too early, or a finite value becomes infinite in `dtype`.
        ConfigurationError: If `path` exists or cannot be written, or `dtype` is none of these.
    """
    if dtype is not None and dtype not in _TARGETS:
        raise ConfigurationError(
            f"Weights cannot be converted to {dtype!r}.", hint=f"Choose one of {', '.join(_TARGETS)}."
        )
    ordered = _in_file_order(tensors, dtype)
    try:
        with path.open("xb") as file:
            try:
                file.write(_header(ordered, dtype, metadata))
                _stream(file, ordered, dtype, progress)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error}", hint="Choose a new file in a folder with enough space."
        ) from error


def _digest(tensors: Mapping[str, StoredTensor], take: Callable[[str, memoryview], None]) -> str:
    """What `weights_digest` returns; `take` is called with each piece and the name of its tensor."""
    _refuse_holes(tensors.values())
    digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    for name, tensor in sorted(tensors.items()):
        for text in (name, tensor.dtype, ",".join(map(str, tensor.shape)), str(tensor.length)):
            # JSON headers can hold unpaired surrogates, which plain UTF-8 cannot.
            field = text.encode("utf-8", "surrogatepass")
            digest.update(len(field).to_bytes(8, "little") + field)
        for piece in tensor.chunks(buffer):
            digest.update(piece)
            take(name, piece)
    return f"sha256:{digest.hexdigest()}"


def _write_all(file: BinaryIO, place: int, data: memoryview) -> None:
    file.seek(place)
    while data:
        data = data[file.write(data) :]


def _in_file_order(tensors: Mapping[str, StoredTensor], dtype: str | None) -> dict[str, StoredTensor]:
    """Largest elements first, as the safetensors library orders them: everything is aligned without holes."""
    order = sorted(tensors, key=lambda name: (-_item_bytes(tensors[name], dtype), name))
    return {name: tensors[name] for name in order}


def _header(tensors: Mapping[str, StoredTensor], dtype: str | None, metadata: Mapping[str, str] | None) -> bytes:
    """The file up to the first tensor's bytes, for tensors that follow one another in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        written = _written_dtype(tensor, dtype)
        begin, end = end, end + _written_bytes(tensor, dtype)
        header[name] = {"dtype": safetensors_name(written), "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stream(
    file: BinaryIO, tensors: Mapping[str, StoredTensor], dtype: str | None, progress: Callable[[int], None] | None
) -> None:
    tell, buffer = progress or (lambda _: None), memoryview(bytearray(CHUNK_BYTES))
    for tensor in tensors.values():
        written = _written_dtype(tensor, dtype)
        if written == tensor.dtype:
            for piece in tensor.chunks(buffer):
                file.write(piece)
                tell(len(piece))
            continue
        for values in tensor.elements(CHUNK_BYTES // DTYPES[tensor.dtype].bytes):
            file.write(_converted(values, tensor, written).view(np.uint8).data)
            tell(values.nbytes)


def _converted(values: NDArray[Any], tensor: StoredTensor, dtype: str) -> NDArray[Any]:
    """Some of a tensor's elements, one-dimensional, as `dtype`."""
    result = rounded(values, dtype)
    with np.errstate(all="ignore"):
        overflown = np.isfinite(values) & np.isinf(result) if not np.isfinite(result).all() else np.False_
    if overflown.any():
        raise CheckpointError(
            f"{tensor.name!r} in {tensor.file} holds {float(values[overflown][0]):g}, which is infinite in {dtype}.",
            hint="Keep the weights' dtype, or choose one of a larger range such as bfloat16.",
        )
    return result


def _written_dtype(tensor: StoredTensor, dtype: str | None) -> str:
    return tensor.dtype if dtype is None or tensor.dtype not in FLOATS else dtype


def _written_bytes(tensor: StoredTensor, dtype: str | None) -> int:
    converts = _written_dtype(tensor, dtype) != tensor.dtype
    return math.prod(tensor.shape) * _item_bytes(tensor, dtype) if converts else tensor.length


def _item_bytes(tensor: StoredTensor, dtype: str | None) -> int:
    """Size of an element as written; of a dtype that is not in the table, from the tensor's own, 0 below a byte."""
    known = OF_SAFETENSORS.get(safetensors_name(_written_dtype(tensor, dtype)))
    return tensor.length // max(1, math.prod(tensor.shape)) if known is None else known.bytes
