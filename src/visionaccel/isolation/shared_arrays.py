"""Arrays in memory that two processes map. Nothing but names, dtypes, shapes and offsets needs to be sent."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import Array, as_numpy

_ALIGNMENT = 64
_GROWTH = 1.5
_BLOCK = 512
"""The unit of `st_blocks`, whatever the file system's is."""


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """Where an array lies in the shared memory, C-contiguous.

    Attributes:
        name: The array's name.
        dtype: Its dtype, ml_dtypes' included.
        shape: Its shape.
        offset: Its first byte, a multiple of 64.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


class SharedArrays:
    """One memory file, mapped by the process that writes arrays into it and by the one that reads them.

    An anonymous file (memfd) has no name that others could open or that a crash could leave behind. The mapping is kept
    from call to call, so that only the first call of each size meets pages that are not mapped yet.

    Args:
        fd: The file; it belongs to this object from then on.

    Attributes:
        fd: The file; -1 once closed, as its number may soon be that of another file.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls, name: str, content: bytes = b"") -> SharedArrays:
        """A new memory file, which never shrinks, whatever the other side does to it.

        Args:
            name: What it is called in /proc, for people only.
            content: What it holds until the first array is written.
        """
        import fcntl  # not on every system, where importing this package must not fail

        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Reading behind the end of a file that another process cut off would kill this one.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.ftruncate(fd, _whole_pages(max(len(content), 1)))
        return cls(fd)

    def write(self, arrays: Mapping[str, Array]) -> tuple[ArrayPlace, ...]:
        """Copy arrays into the memory, over what was there, and enlarge it if need be.

        Args:
            arrays: numpy arrays or torch tensors of any numeric dtype, order and shape.

        Raises:
            TypeError: If an array holds Python objects.
            ValueError: If it is closed.
        """
        values = {name: as_numpy(array) for name, array in arrays.items()}
        places, end = [], 0
        for name, value in values.items():
            if value.dtype.hasobject:
                raise TypeError(f"array {name!r} holds Python objects; only numbers can be given to another process.")
            places.append(ArrayPlace(name, value.dtype, value.shape, end))
            end += math.ceil(value.nbytes / _ALIGNMENT) * _ALIGNMENT
        size = self._size()
        if end > size:
            os.ftruncate(self.fd, _whole_pages(max(end, _GROWTH * size)))
        for place, value in zip(places, values.values(), strict=True):
            np.copyto(self.view(place), value)
        return tuple(places)

    def view(self, place: ArrayPlace) -> NDArray[Any]:
        """An array in the memory, without a copy; the next `write` of either side changes it.

        Raises:
            TypeError: If it does not lie within the memory.
            ValueError: If it is closed.
        """
        size = self._size()
        if self._map is None or len(self._map) < size:
            # Views of the former mapping keep it alive as long as they need it.
            self._map = mmap.mmap(self.fd, size)
        return np.ndarray(place.shape, place.dtype, buffer=self._map, offset=place.offset)

    def copies(self, places: Sequence[ArrayPlace]) -> dict[str, NDArray[Any]]:
        """Copies of what the other side wrote, by name.

        Raises:
            ValueError: If the places are larger together than what was written. The file's size says little: it may be
                any number, and places may overlap, without that anything was allocated for them.
        """
        wanted = sum(math.prod(place.shape) * place.dtype.itemsize for place in places)
        written = os.fstat(self.fd).st_blocks * _BLOCK
        if wanted > written:
            raise ValueError(f"arrays of {wanted} bytes in {written} bytes of memory")
        return {place.name: self.view(place).copy() for place in places}

    def close(self) -> None:
        """Give back the file and the mapping, or leave the mapping to the last view of it."""
        if self._map is not None:
            with suppress(BufferError):
                self._map.close()
            self._map = None
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _size(self) -> int:
        if self.fd < 0:
            raise ValueError("the shared memory is closed.")
        return os.fstat(self.fd).st_size


def _whole_pages(size: float) -> int:
    return math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
