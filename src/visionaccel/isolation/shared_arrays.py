"""Arrays in memory that two processes map. Only names, dtypes, shapes and offsets need to be sent.

An array is only taken for numbers: with a dtype of Python objects the memory would hold pointers of the child's choice.
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
    """The text from which `numeric_dtype` makes a dtype."""
    return dtype.name if getattr(ml_dtypes, dtype.name, None) is dtype.type else dtype.str


def numeric_dtype(code: object) -> np.dtype[Any]:
    """A dtype of numbers from its code; ValueError if it is not one."""
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
    """Where an array lies in the shared memory, C-contiguous; `offset` is its first byte, a multiple of 64."""

    name: str
    dtype: Annotated[np.dtype[Any], PlainValidator(numeric_dtype)]
    shape: Annotated[tuple[_Size, ...], Field(max_length=64)]
    offset: _Size


class SharedArrays:
    """One memory file, mapped by the process that writes arrays into it and by the one that reads them.

    An anonymous file (memfd) has no name that others could open or that a crash could leave behind. It stays mapped
    from call to call, so that only the first call of each size meets pages that are not mapped yet.

    Attributes:
        fd: The file, which belongs to this object; -1 once closed, as its number may soon be that of another file.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls, name: str, content: bytes = b"") -> SharedArrays:
        """A new memory file that holds the content until the first array is written. It never shrinks."""
        import fcntl  # not on every system, where importing this package must not fail

        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Reading behind the end of a file that another process cut off would kill this one.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.ftruncate(fd, max(len(content), 1))
        return cls(fd)

    def write(self, arrays: Mapping[str, Array]) -> tuple[ArrayPlace, ...]:
        """Copy numpy arrays or torch tensors into the memory, over what was there, and enlarge it if need be.

        TypeError if an array holds anything else than numbers, ValueError if the memory is closed.
        """
        values = {name: as_numpy(array) for name, array in arrays.items()}
        places, end = [], 0
        for name, value in values.items():
            try:
                numeric_dtype(dtype_code(value.dtype))
            except ValueError:
                raise TypeError(
                    f"array {name!r} is of dtype {value.dtype}; only numbers can be given to another process."
                ) from None
            places.append(ArrayPlace(name, value.dtype, value.shape, end))
            end += math.ceil(value.nbytes / _ALIGNMENT) * _ALIGNMENT
        size = self._size()
        if end > size:
            os.ftruncate(self.fd, max(end, size + size // 2))  # by half at least, so that few calls enlarge it
        for place, value in zip(places, values.values(), strict=True):
            np.copyto(self.view(place), value)
        return tuple(places)

    def view(self, place: ArrayPlace) -> NDArray[Any]:
        """An array in the memory, without a copy; the next `write` of either side changes it.

        TypeError if it does not lie within the memory, ValueError if the memory is closed.
        """
        size = self._size()
        if self._map is None or len(self._map) < size:
            # Views of the former mapping keep it alive as long as they need it.
            self._map = mmap.mmap(self.fd, size)
        return np.ndarray(place.shape, place.dtype, buffer=self._map, offset=place.offset)

    def copies(self, places: Sequence[ArrayPlace]) -> dict[str, NDArray[Any]]:
        """Copies of what the other side wrote, by name; ValueError if together they are larger than what it allocated.

        The file's size does not tell that: it may be any number, and places may overlap.
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
