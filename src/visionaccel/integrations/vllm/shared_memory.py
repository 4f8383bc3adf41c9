"""Memory that the processes of one server share, for faults and metrics, which vLLM has no channel for.

It is an anonymous file (memfd): no disk can be full, no other user finds it, and the system frees it with the last
process that holds it, however that process ends. What must not fail later is allocated when it is claimed.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from visionaccel.errors import ConfigurationError

_VARIABLE = "_VISIONACCEL_MEMORY"
_NUMBER_BYTES = 8
_ENTRY_BYTES = 3 * _NUMBER_BYTES
_RECORD = struct.Struct("@QII")  # number, length, checksum
_ENDED = 2**64 - 1
"""Owner of an area that is kept though its process has ended."""


@dataclass(frozen=True, slots=True)
class Section:
    """Equal areas, each claimed by one process, and a table with three numbers for each: see `Area`."""

    name: str  # in errors
    table: int  # where the table begins in the memory
    start: int  # where the first area begins
    areas: int
    slots: int  # records in an area; a later one overwrites the one of `slots` records before
    slot_bytes: int  # of a record with its header
    kept: bool  # an area stays when its process ends

    @property
    def area_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def capacity(self) -> int:
        """Most bytes of a record."""
        return self.slot_bytes - _RECORD.size


_TABLES = 8192
FAULTS = Section("faults of encodes", 0, _TABLES, areas=64, slots=512, slot_bytes=5120, kept=False)
METRICS = Section(
    "metrics", 2048, _TABLES + FAULTS.areas * FAULTS.area_bytes, areas=256, slots=2, slot_bytes=2**17, kept=True
)
_SIZE = METRICS.start + METRICS.areas * METRICS.area_bytes
"""Bytes that are mapped; only the tables and claimed areas take memory."""


class SharedMemory:
    """The memory, mapped into this process: `memory` is all of it, `numbers` the tables. Its file `fd` stays open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.memory = mmap.mmap(fd, _SIZE)
        # Stores a number at once, where struct writes zeros first, which another process may read.
        self.numbers = memoryview(self.memory)[:_TABLES].cast("Q")
        self._threads: dict[int, threading.Lock] = {}  # by process: a fork's copy of a lock may never be released
        self._claimed: set[tuple[int, int]] = set()  # process and place of each area that was claimed through this

    def claim(self, section: Section, name: str = "") -> Area:
        """Allocate an area for this process; `name` tells the areas of one process apart.

        Raises:
            ConfigurationError: If every area is taken, or this process has one of that name.
            OSError: If there is no memory.
        """
        process = os.getpid()
        with self.alone(section.table, _ENTRY_BYTES * section.areas):
            found = None
            for area in (Area(self, section, index) for index in range(section.areas)):
                owner = area.owner
                if owner == process and section.kept:  # of another process, which had this one's number before
                    area.give_to(_ENDED)
                elif owner == process and (process, area.start) in self._claimed:
                    if area.is_named(name):
                        raise ConfigurationError(
                            f"two engines of process {process} have the same identifier ({name!r}), so reports of "
                            "their workers cannot be distinguished.",
                            hint="Shut the first one down, or start the second one again.",
                        )
                elif owner in (0, process) or (not section.kept and _ended(owner)):
                    found = found or area
            if found is not None:
                os.posix_fallocate(self._fd, found.start, section.area_bytes)
                self._claimed.add((process, found.start))
                found.give_to(process, name)
                return found
        raise ConfigurationError(
            f"all {section.areas} places for the {section.name} of a server's processes are taken.",
            hint="Start fewer engines from one process.",
        )

    def areas(self, section: Section) -> Iterator[Area]:
        """The areas that processes have claimed."""
        return (area for index in range(section.areas) if (area := Area(self, section, index)).owner)

    @contextmanager
    def alone(self, start: int, size: int) -> Iterator[None]:
        """Keep other threads and processes out of a range of the memory."""
        with self._threads.setdefault(os.getpid(), threading.Lock()):
            fcntl.lockf(self._fd, fcntl.LOCK_EX, size, start)  # given back when this process is killed, too
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, size, start)


class Area:
    """A ring of records, which begins at `start` in the memory.

    Its three numbers in the table are its owner, how many records were written, and its name's digest.
    """

    def __init__(self, shared: SharedMemory, section: Section, index: int) -> None:
        self._shared, self._section = shared, section
        self._entry = section.table + _ENTRY_BYTES * index
        self._numbers = shared.numbers[self._entry // _NUMBER_BYTES :][:3]
        self.start = section.start + section.area_bytes * index

    @property
    def owner(self) -> int:
        """The process that claimed it; 0 if none has."""
        return self._numbers[0]

    @property
    def ended(self) -> bool:
        """Whether the process that claimed it has ended."""
        return _ended(self.owner)

    @property
    def written(self) -> int:
        """How many records were written so far. The last `slots` of them can be read."""
        return self._numbers[1]

    def give_to(self, process: int, name: str = "") -> None:
        """Change the owner and the area's name; 0 frees the area."""
        self._numbers[2] = _digest(name)
        self._numbers[0] = process

    def is_named(self, name: str) -> bool:
        return self._numbers[2] == _digest(name)

    def append(self, content: bytes) -> None:
        """Write a record of at most a section's capacity."""
        if len(content) > self._section.capacity:
            raise ValueError(f"a record for {self._section.name} holds at most {self._section.capacity} bytes.")
        with self._shared.alone(self._entry, _ENTRY_BYTES):
            number = self.written
            place = self._place(number)
            header = _RECORD.pack(number, len(content), _checksum(number, content))
            self._shared.memory[place : place + _RECORD.size + len(content)] = header + content
            self._numbers[1] = number + 1

    def record(self, number: int) -> bytes | None:
        """A record by its number, from 0; None if it is broken, overwritten or not written yet."""
        if not 0 <= number < self.written:
            return None
        place = self._place(number)
        found, length, checksum = _RECORD.unpack_from(self._shared.memory, place)
        if found != number or length > self._section.capacity:
            return None
        start = place + _RECORD.size
        content = self._shared.memory[start : start + length]
        return content if checksum == _checksum(number, content) else None

    def _place(self, number: int) -> int:
        return self.start + number % self._section.slots * self._section.slot_bytes


def make_shared_memory(*, inherit: bool = False) -> None:
    """Make memory for this process and those that it starts.

    With `inherit`, use the memory that this process inherited, as where several API servers ask the same engines.
    Otherwise that belongs to another engine's launcher, which may end first.
    """
    owner = os.environ.get(_VARIABLE, "").partition(":")[0]
    if owner == str(os.getpid()) or (inherit and owner):
        return
    try:
        fd = os.memfd_create("visionaccel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _SIZE)
        # Reading behind the end of a file that another process cut off would kill this one.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        os.posix_fallocate(fd, 0, _TABLES)
        state = os.fstat(fd)
        named = f"{os.getpid()}:{fd}:{state.st_dev}:{state.st_ino}"
        _opened_memories[named] = SharedMemory(fd)
    except (AttributeError, OSError) as error:
        raise ConfigurationError(
            f"memory that vLLM's processes share cannot be made: {error}.",
            hint="visionaccel in vLLM needs Linux and its memfd_create, which a sandbox may forbid.",
        ) from error
    os.environ[_VARIABLE] = named


def shared_memory() -> SharedMemory | None:
    """The memory of this server, opened on the first call; None where none was made.

    Raises:
        ConfigurationError: If it cannot be opened, as when the process that made it has ended.
    """
    named = os.environ.get(_VARIABLE)
    if not named:
        return None
    if named not in _opened_memories:
        try:
            _opened_memories[named] = SharedMemory(_opened(*map(int, named.split(":"))))
        except (OSError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the memory that vLLM's processes share cannot be opened ({_VARIABLE}={named}): {error}.",
                hint="Check that the process that started the engine still runs and that /proc is mounted.",
            ) from error
    return _opened_memories[named]


_opened_memories: dict[str, SharedMemory] = {}


def _opened(owner: int, fd: int, device: int, inode: int) -> int:
    opened = os.open(f"/proc/{owner}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    state = os.fstat(opened)
    if (state.st_dev, state.st_ino) != (device, inode):  # that process has ended, and another has its number
        os.close(opened)
        raise FileNotFoundError(f"process {owner} does not hold it")
    return opened


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:_NUMBER_BYTES], "little")


def _ended(process: int) -> bool:
    return process == _ENDED or not Path("/proc", str(process)).exists()


def _checksum(number: int, content: bytes) -> int:
    return zlib.crc32(content, number & 0xFFFFFFFF)
