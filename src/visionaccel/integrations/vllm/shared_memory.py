"""Memory that the processes of one server share, for faults and metrics, because vLLM has no channel for them.

It is an anonymous file (memfd): no disk can be full, no other user can open it, and the system frees it with the last
process that has it open, however that process ends. What must not fail later is allocated when it is claimed.

A worker reports here that it could not encode an item. An exception in the vision tower would end the engine, and a
placeholder embedding would become part of an answer. So the worker writes a fault before its step returns, and the
scheduler reads it before it accepts any token of that step.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import threading
import weakref
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
"""The owner of an area that is kept after its process has ended."""

ALL_ITEMS = "*"
"""Key of a fault that covers everything encoded so far: the device returned wrong results for an unknown time."""

REPLACED = "="
"""Key of a message about the encoder itself: its weights were replaced, or it no longer has the served ones."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One item that could not be encoded."""

    key: str  # what `visionaccel.service.item_key` returns for the item's pixels and grid, or one of those above
    message: str  # why; cut after about 5000 bytes


LOST = Fault("", "a worker's report about its encodes could not be read.")
"""Replaces a report that cannot be read, which may be about any item in flight."""


@dataclass(frozen=True, slots=True)
class Section:
    """Areas of equal size, each claimed by one process, and a table with three numbers for each; see `Area`."""

    name: str  # in errors
    table: int  # where the table begins in the memory
    start: int  # where the first area begins
    areas: int
    slots: int  # records in an area; each overwrites the one written `slots` records before
    slot_bytes: int  # of a record with its header
    kept: bool  # whether an area is kept after its process ends

    @property
    def area_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def capacity(self) -> int:
        """The most bytes in a record."""
        return self.slot_bytes - _RECORD.size


_TABLES = 8192
FAULTS = Section("faults of encodes", 0, _TABLES, areas=64, slots=512, slot_bytes=5120, kept=False)
METRICS = Section(
    "metrics", 2048, _TABLES + FAULTS.areas * FAULTS.area_bytes, areas=256, slots=2, slot_bytes=2**17, kept=True
)
_SIZE = METRICS.start + METRICS.areas * METRICS.area_bytes
"""Bytes that are mapped; only the tables and claimed areas use memory."""


class SharedMemory:
    """The mapped memory: `memory` is all of it, `numbers` the tables. Its file `fd` stays open."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.memory = mmap.mmap(fd, _SIZE)
        # Stores a number at once. struct would write zeros first, which another process could read.
        self.numbers = memoryview(self.memory)[:_TABLES].cast("Q")
        self._threads: dict[int, threading.Lock] = {}  # by process: a fork's copy of a lock may never be released
        self._claimed: set[tuple[int, int]] = set()  # process and start of each area that was claimed here

    def claim(self, section: Section, name: str = "") -> Area:
        """Allocate an area for this process; `name` tells the areas of one process apart.

        Raises:
            ConfigurationError: If all areas are taken, or this process has one of that name.
            OSError: If there is not enough memory.
        """
        process = os.getpid()
        with self.alone(section.table, _ENTRY_BYTES * section.areas):
            found = None
            for area in (Area(self, section, index) for index in range(section.areas)):
                owner = area.owner
                if owner == process and section.kept:  # of an ended process that had the same number
                    area.give_to(_ENDED)
                elif owner == process and (process, area.start) in self._claimed:
                    if area.is_named(name):
                        raise ConfigurationError(
                            f"two engines of process {process} have the same identifier ({name!r}), so reports of "
                            "their workers cannot be distinguished.",
                            hint="Shut the first one down, or start the second one again.",
                        )
                elif owner in (0, process) or (not section.kept and area.ended):
                    found = found or area
            if found is not None:
                os.posix_fallocate(self._fd, found.start, section.area_bytes)
                self._claimed.add((process, found.start))
                found.give_to(process, name)
                return found
        raise ConfigurationError(
            f"all {section.areas} slots for the {section.name} of a server's processes are in use.",
            hint="Start fewer engines from one process.",
        )

    def areas(self, section: Section) -> Iterator[Area]:
        """Return the areas that processes have claimed."""
        return (area for index in range(section.areas) if (area := Area(self, section, index)).owner)

    @contextmanager
    def alone(self, start: int, size: int) -> Iterator[None]:
        """Lock a range of the memory against other threads and processes."""
        with self._threads.setdefault(os.getpid(), threading.Lock()):
            fcntl.lockf(self._fd, fcntl.LOCK_EX, size, start)  # the system unlocks it if this process is killed
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, size, start)


class Area:
    """A ring of records, which begins at `start` in the memory.

    Its numbers in the table are its owner, how many records were written, and a digest of its name.
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
        return self.owner == _ENDED or not Path("/proc", str(self.owner)).exists()

    @property
    def written(self) -> int:
        """How many records were written so far; the last `slots` of them can be read."""
        return self._numbers[1]

    def give_to(self, process: int, name: str = "") -> None:
        """Set the area's owner and name; 0 frees the area."""
        self._numbers[2] = _digest(name)
        self._numbers[0] = process

    def is_named(self, name: str) -> bool:
        return self._numbers[2] == _digest(name)

    def append(self, content: bytes) -> None:
        """Write a record of at most the section's capacity."""
        if len(content) > self._section.capacity:
            raise ValueError(f"a record for {self._section.name} holds at most {self._section.capacity} bytes.")
        with self._shared.alone(self._entry, _ENTRY_BYTES):
            number = self.written
            place = self._place(number)
            header = _RECORD.pack(number, len(content), _checksum(number, content))
            self._shared.memory[place : place + _RECORD.size + len(content)] = header + content
            self._numbers[1] = number + 1

    def record(self, number: int) -> bytes | None:
        """Return a record by its number, from 0; None if it is broken, overwritten or not written yet."""
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


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:_NUMBER_BYTES], "little")


def _checksum(number: int, content: bytes) -> int:
    return zlib.crc32(content, number & 0xFFFFFFFF)


_opened_memories: dict[str, SharedMemory] = {}


def make_shared_memory(*, inherit: bool = False) -> None:
    """Make memory for this process and those that it starts.

    With `inherit`, use the memory that this process inherited, as when several API servers use the same engines.
    Otherwise inherited memory belongs to another engine's launcher, which may end first.
    """
    owner = os.environ.get(_VARIABLE, "").partition(":")[0]
    if owner == str(os.getpid()) or (inherit and owner):
        return
    try:
        fd = os.memfd_create("visionaccel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _SIZE)
        # If another process could shrink the file, reading it here could end this process.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        os.posix_fallocate(fd, 0, _TABLES)
        state = os.fstat(fd)
        named = f"{os.getpid()}:{fd}:{state.st_dev}:{state.st_ino}"
        _opened_memories[named] = SharedMemory(fd)
    except (AttributeError, OSError) as error:
        raise ConfigurationError(
            f"memory that vLLM's processes share cannot be created: {error}.",
            hint="In vLLM, visionaccel needs Linux with memfd_create, which a sandbox may forbid.",
        ) from error
    os.environ[_VARIABLE] = named


def shared_memory() -> SharedMemory | None:
    """Return this server's shared memory, opened on the first call; None if none was created.

    Raises:
        ConfigurationError: If it cannot be opened, for example because the process that made it has ended.
    """
    named = os.environ.get(_VARIABLE)
    if not named:
        return None
    if named not in _opened_memories:
        try:
            owner, fd, *inode = map(int, named.split(":"))
            opened = os.open(f"/proc/{owner}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            state = os.fstat(opened)
            if [state.st_dev, state.st_ino] != inode:  # that process has ended, and another has its number
                os.close(opened)
                raise FileNotFoundError(f"process {owner} does not hold it")
            _opened_memories[named] = SharedMemory(opened)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"the memory that vLLM's processes share cannot be opened ({_VARIABLE}={named}): {error}.",
                hint="Check that the process that started the engine still runs and that /proc is mounted.",
            ) from error
    return _opened_memories[named]


def report_fault(fault: Fault, engine: str) -> bool:
    """Report a fault to the scheduler of an engine, by its identifier. False if none listens; the caller must raise."""
    shared = shared_memory()
    if shared is None:
        return False
    # The engine's process is this one or, with vLLM's multiprocess executor, the parent of this worker.
    by_owner = {area.owner: area for area in shared.areas(FAULTS) if area.is_named(engine)}
    area = by_owner.get(os.getpid()) or by_owner.get(os.getppid())
    if area is None:
        return False
    content = f"{fault.key}\n{fault.message}".encode(errors="replace")
    area.append(content[: FAULTS.capacity])
    return True


class FaultReader:
    """Reads the faults for an engine, by its identifier, until `close` or until nothing refers to the reader.

    Raises:
        ConfigurationError: If there is not enough memory for faults, or that engine has a reader.
    """

    def __init__(self, engine: str) -> None:
        self._area: Area | None = None
        shared = shared_memory()
        if shared is None:
            return
        try:
            self._area = shared.claim(FAULTS, engine)
        except OSError as error:
            raise ConfigurationError(
                f"not enough memory for the {FAULTS.area_bytes} bytes in which workers report faults: {error}.",
                hint="Give the server more memory.",
            ) from error
        self._read = self._area.written  # an earlier engine's faults are skipped
        self._free = weakref.finalize(self, _free, self._area, os.getpid())
        self._free.atexit = False

    def new(self) -> list[Fault]:
        """Return the faults since the last call; takes less than a microsecond if nothing has failed.

        If a report is broken, or there were more than the area holds, every item in flight counts as faulty.
        """
        if self._area is None or (written := self._area.written) == self._read:
            return []
        numbers = range(max(self._read, written - FAULTS.slots), written)
        records = [record for number in numbers if (record := self._area.record(number)) is not None]
        parts = [record.decode(errors="ignore").partition("\n") for record in records]
        faults = [Fault(key, message) for key, _, message in parts]
        if len(faults) < written - self._read:
            faults += [LOST, Fault(ALL_ITEMS, LOST.message)]
        self._read = written
        return faults

    def close(self) -> None:
        if self._area is not None:
            self._free()
            self._area = None


def _free(area: Area, process: int) -> None:
    if process == os.getpid():  # a fork has a copy of the reader
        area.give_to(0)
