"""One tensor of a checkpoint: where its bytes lie, and those bytes."""

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
    """Where one tensor's bytes lie, little-endian and C-contiguous.

    Attributes:
        name: Its name in the checkpoint, or that of the fused weight that it is a part of.
        file: The shard, with symbolic links resolved.
        offset: First byte in the file.
        length: Number of bytes.
        dtype: `float32`, `bfloat16`, ... or safetensors' own name where it is not a float.
        shape: The tensor's shape.
        origin: The state of `file` when its header was read, or the memory file that it is; None if it is not known.
    """

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]
    origin: FileState | MemoryFile | None = field(default=None, compare=False, repr=False)

    def chunks(self, buffer: memoryview) -> Iterator[memoryview]:
        """The tensor's bytes in order, at most a buffer at a time; each chunk is overwritten by the next.

        Raises:
            ChangedFileError: If the file is not in the state in which its header was read. A change during the reading
                shows after the last chunk.
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
                            f"{self.file} ended in the middle of {self.name!r}.",
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
            self.origin.require_same(FileState.of(opened), self.file)

    def elements(self, at_once: int) -> Iterator[NDArray[Any]]:
        """The elements in order, one-dimensional, at most so many at a time; each array is overwritten by the next.

        Raises:
            CheckpointError: If its dtype is not a float that numpy has, and as `chunks`.
        """
        if self.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.file}: {self.name!r} is {self.dtype}, and {', '.join(FLOATS)} are read.",
                hint="Use an unquantised checkpoint of the same model.",
            )
        values = np.empty(at_once, FLOATS[self.dtype])
        for piece in self.chunks(values.view(np.uint8).data):
            yield values[: len(piece) // values.itemsize]

    def read(self) -> NDArray[Any]:
        """The tensor as an array of its shape and dtype, in memory that no file backs; errors as `elements`."""
        pieces = list(self.elements(max(1, math.prod(self.shape))))  # one, or none of an empty tensor
        values: NDArray[Any] = pieces[0] if pieces else np.empty(0, FLOATS[self.dtype])
        return values.reshape(self.shape)

    def holds_the_same_as(self, other: StoredTensor) -> bool:
        """Whether dtype, shape and every byte are equal, wherever the two lie; errors as `chunks`."""
        if (self.dtype, self.shape, self.length) != (other.dtype, other.shape, other.length):
            return False
        ours, theirs = (tensor.chunks(memoryview(bytearray(CHUNK_BYTES))) for tensor in (self, other))
        same_place = (self.file, self.offset) == (other.file, other.offset)
        return same_place or all(one == another for one, another in zip(ours, theirs, strict=True))


def rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Floats as another dtype, rounded to nearest, ties to even, and float64 by way of float32, as in torch."""
    with np.errstate(all="ignore"):  # ml_dtypes' functions report NaN as invalid, also where they only look at it
        result: NDArray[Any] = values.astype(np.float32, copy=False).astype(FLOATS[dtype], copy=False)
    return result
