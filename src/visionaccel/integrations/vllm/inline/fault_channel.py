"""How a worker process reports to the engine's scheduler that it could not encode an item.

An exception in the vision tower ends the engine, and a placeholder embedding would become part of an answer. So the
worker writes into shared memory before its step returns, and the scheduler looks there before it accepts any token of
that step. The memory is allocated before the first step, so writing cannot fail. If more was written than there is room
for, the scheduler treats every item that may have been meant as faulty.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass

from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm.shared_memory import FAULTS, Area, shared_memory


@dataclass(frozen=True, slots=True)
class Fault:
    """One item that could not be encoded."""

    key: str  # what `visionaccel.service.item_key` gives for the item's pixels and grid, or one of those below
    message: str  # why; cut after about 5000 bytes


ALL_ITEMS = "*"
"""Key of a fault that covers everything encoded so far: the device has returned wrong results for an unknown time."""

REPLACED = "="
"""Key of a message about the encoder itself: its weights were replaced, or it no longer has the served ones."""

LOST = Fault("", "a worker's report about its encodes could not be read.")
"""Read in the place of a report that cannot be read: any item in flight may be meant."""


def report_fault(fault: Fault, engine: str) -> bool:
    """Report to the scheduler of an engine, by its identifier. False if none listens: then the caller must raise."""
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
    """The scheduler's end, for the engine of an identifier. It listens until `close`, or until nothing holds it.

    Raises:
        ConfigurationError: If there is no memory for what workers report, or that engine has a reader.
    """

    def __init__(self, engine: str) -> None:
        shared = shared_memory()
        self._area: Area | None = None
        if shared is not None:
            try:
                self._area = shared.claim(FAULTS, engine)
            except OSError as error:
                raise ConfigurationError(
                    f"there is no memory for the {FAULTS.area_bytes} bytes in which workers report faults: {error}.",
                    hint="Give the server more memory.",
                ) from error
            # What an earlier engine left says nothing about this one.
            self._read = self._area.written
            self._free = weakref.finalize(self, _free, self._area, os.getpid())
            self._free.atexit = False

    def new(self) -> list[Fault]:
        """Faults since the last call. Costs less than a microsecond if there are none."""
        if self._area is None:
            return []
        written = self._area.written
        if written == self._read:
            return []
        records = [self._area.record(number) for number in range(max(self._read, written - FAULTS.slots), written)]
        faults = [_fault(record) for record in records if record is not None]
        if len(faults) < written - self._read:
            faults += [LOST, Fault(ALL_ITEMS, LOST.message)]
        self._read = written
        return faults

    def close(self) -> None:
        if self._area is not None:
            self._free()
            self._area = None


def _free(area: Area, process: int) -> None:
    if process == os.getpid():  # and not in a fork, which has a copy of the reader
        area.give_to(0)


def _fault(record: bytes) -> Fault:
    key, _, message = record.decode(errors="ignore").partition("\n")
    return Fault(key, message)
