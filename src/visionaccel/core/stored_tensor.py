"""One tensor of a checkpoint: where its bytes are, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.dtypes import FLOATS
from visionaccel.core.memory_files import FileState, MemoryFile
from visionaccel.errors import CheckpointError

CHUNK_BYTES = 1 << 20
"""Bytes read at once, a multiple of every element's size; larger pieces leave the cache before they are hashed."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes are, little-endian and C-contiguous.

    Attributes:
        name: Its name in the checkpoint, or the name of the fused weight that contains it.
        file: The shard, with symbolic links resolved.
        offset: First byte in the file.
        length: Number of bytes.
        dtype: `float32`, `bfloat16`, ... or safetensors' own name for a dtype that is not a float.
        shape: The tensor's shape.
        origin: The state of `file` when its header was read, or the memory file behind it; None if unknown.
    """

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    origin: FileState | MemoryFile | None = field(default=None, compare=False, repr=False)

    def chunks(self, buffer: memoryview) -> Iterator[memoryview]:
        """Read the tensor's bytes in order, at most `len(buffer)` at a time; each chunk is overwritten by the next.

        Raises:
            ChangedFileError: If the file is not in the state in which its header was read. A change while it is read is
                reported after the last chunk.
            CheckpointError: If the file cannot be read or ends too early.
        """
        try:
            with self.file.open("rb") as file:
                self._require_unchanged(file.fileno())
                file.seek(self.offset)
                left = self.length
                while left:
                    piece = buffer[: min(left, len(buffer))]
                    if file.readinto(piece) < len(piece):
                        self._require_unchanged(file.fileno())
                        raise CheckpointError(
                            f"{self.file} ends in the middle of {self.name!r}.",
                            hint="The file was changed or truncated; download it again.",
                        )
                    yield piece
                    left -= len(piece)
                self._require_unchanged(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.name!r} cannot be read from {self.file}: {error}",
                hint="Check the disk, or download the file again.",
            ) from error

    def _require_unchanged(self, opened: int) -> None:
        if isinstance(self.origin, FileState):
            self.origin.require(self.file, FileState.of(opened))

    def elements(self, at_once: int) -> Iterator[NDArray[Any]]:
        """Read the elements in order as 1-D arrays of at most `at_once`; each array is overwritten by the next.

        Raises:
            CheckpointError: If its dtype is not one of `FLOATS`, or the file cannot be read.
            ChangedFileError: As in `chunks`.
        """
        if self.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.file}: {self.name!r} has unsupported dtype {self.dtype}; supported: {', '.join(FLOATS)}.",
                hint="Use an unquantised checkpoint of the same model.",
            )
        values = np.empty(at_once, FLOATS[self.dtype])
        for piece in self.chunks(values.view(np.uint8).data):
            yield values[: len(piece) // values.itemsize]

    def read(self) -> NDArray[Any]:
        """Read the tensor as a new array of its shape and dtype. Raises the errors of `elements`."""
        pieces = list(self.elements(max(1, math.prod(self.shape))))  # one, or none of an empty tensor
        values: NDArray[Any] = pieces[0] if pieces else np.empty(0, FLOATS[self.dtype])
        return values.reshape(self.shape)

    def holds_the_same_as(self, other: StoredTensor) -> bool:
        """Return whether dtype, shape and every byte are equal, in any two files. Raises the errors of `chunks`."""
        if (self.dtype, self.shape, self.length) != (other.dtype, other.shape, other.length):
            return False
        ours, theirs = (tensor.chunks(memoryview(bytearray(CHUNK_BYTES))) for tensor in (self, other))
        same_place = (self.file, self.offset) == (other.file, other.offset)
        return same_place or all(one == another for one, another in zip(ours, theirs, strict=True))


def rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Convert floats to a floating dtype, to nearest with ties to even; float64 goes through float32, as in torch."""
    with np.errstate(all="ignore"):  # ml_dtypes' functions report NaN as invalid even if they only read it
        result: NDArray[Any] = values.astype(np.float32, copy=False).astype(FLOATS[dtype], copy=False)
    return result
