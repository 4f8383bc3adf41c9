"""Arrays in memory that two processes map. Only names, dtypes, shapes and offsets need to be sent.

Only dtypes of numbers are accepted: with a dtype of Python objects, the child could choose the pointers in the memory.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainValidator

from visionaccel.core.arrays import Array, as_numpy

_ALIGNMENT = 64
_BLOCK = 512
"""The unit of `st_blocks`, on every file system."""

_NUMBERS = re.compile(r"[<>|=]?[biufc](?:1|2|4|8|16|32)")
_Size = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


def dtype_code(dtype: np.dtype[Any]) -> str:
    """Return the text from which `numeric_dtype` makes a dtype."""
    return dtype.name if getattr(ml_dtypes, dtype.name, None) is dtype.type else dtype.str


def numeric_dtype(code: object) -> np.dtype[Any]:
    """Return the dtype of numbers with that code. Raises ValueError if the code is unknown."""
    if isinstance(code, str):
        if _NUMBERS.fullmatch(code):
            with suppress(TypeError):  # numpy has no numbers of that size
                return np.dtype(code)
        kind = vars(ml_dtypes).get(code)
        if isinstance(kind, type) and issubclass(kind, np.generic):
            return np.dtype(kind)
    raise ValueError(f"not a dtype of numbers: {str(code)[:100]!r}")


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """Where a C-contiguous array is in the shared memory; `offset` is its first byte, a multiple of 64."""

    name: str
    dtype: Annotated[np.dtype[Any], PlainValidator(numeric_dtype)]
    shape: Annotated[tuple[_Size, ...], Field(max_length=64)]
    offset: _Size

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SharedArrays:
    """A memory file that the process that writes arrays and the process that reads them both map.

    An anonymous file (memfd) has no name that others could open or that a crash could leave behind. It stays mapped
    between calls, so that only the first call of each size has to map pages.

    Attributes:
        fd: The file's descriptor, which this object owns; -1 once closed, because the number may be reused.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls, name: str, content: bytes = b"") -> SharedArrays:
        """Make a memory file that holds the content until the first array is written. It never shrinks."""
        import fcntl  # does not exist on every system on which this package can be imported

        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Reading past the end of a file that another process shortened would kill this one, and a seal that the other
        # process adds would stop this one from writing.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.ftruncate(fd, max(len(content), 1))
        return cls(fd)

    def write(self, arrays: Mapping[str, Array]) -> tuple[ArrayPlace, ...]:
        """Copy numpy arrays or torch tensors into the memory, over the previous ones. Enlarges it if needed.

        Raises TypeError if an array holds anything but numbers, ValueError if the memory is closed.
        """
        values = {name: as_numpy(array) for name, array in arrays.items()}
        places, end = [], 0
        for name, value in values.items():
            try:
                numeric_dtype(dtype_code(value.dtype))
            except ValueError:
                raise TypeError(
                    f"array {name!r} has dtype {value.dtype}; only numbers can be sent to another process."
                ) from None
            places.append(ArrayPlace(name, value.dtype, value.shape, end))
            end += math.ceil(value.nbytes / _ALIGNMENT) * _ALIGNMENT
        size = self._size()
        if end > size:
            os.ftruncate(self.fd, max(end, size + size // 2))  # by half or more, so that few calls enlarge it
        for place, value in zip(places, values.values(), strict=True):
            np.copyto(self.view(place), value)
        return tuple(places)

    def view(self, place: ArrayPlace) -> NDArray[Any]:
        """Return an array in the memory without copying it. The next `write` of either process changes it.

        Raises ValueError if it is not within the memory, or if the memory is closed.
        """
        size, end = self._size(), place.offset + place.nbytes
        if end > size:  # numpy's check overflows for large offsets
            raise ValueError(f"an array that ends at byte {end} of {size} bytes of memory")
        if self._map is None or len(self._map) < end:
            # The other process may have made the file too large to map, so map no more than arrays need, with room to
            # grow. Views of the previous mapping keep it alive.
            self._map = mmap.mmap(self.fd, min(size, max(2 * end, 1)))
        return np.ndarray(place.shape, place.dtype, buffer=self._map, offset=place.offset)

    def copies(self, places: Sequence[ArrayPlace]) -> dict[str, NDArray[Any]]:
        """Copy what the other process wrote, by name.

        Raises ValueError if the arrays together are larger than the memory that it allocated. The file's size says
        nothing about that, because it may be any number; and places may overlap.
        """
        wanted = sum(place.nbytes for place in places)
        written = os.fstat(self.fd).st_blocks * _BLOCK
        if wanted > written:
            raise ValueError(f"arrays of {wanted} bytes in {written} bytes of memory")
        return {place.name: self.view(place).copy() for place in places}

    def close(self) -> None:
        """Close the file and the mapping; a mapping that still has views is closed with the last of them."""
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
