"""How a worker process tells the engine's scheduler that it could not encode an item.

vLLM's step has no channel for it: an exception in the vision tower ends the engine, and an embedding that is wrong on
purpose would be answered from. So the worker appends a line to a file in a private folder before its step returns, and
the scheduler looks there, after a step with encoder inputs, before it accepts any token of that step.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from visionaccel.integrations.vllm.board import board

__all__ = ["EVERYTHING", "LOST", "Fault", "FaultReader", "report_fault"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One item that could not be encoded.

    Attributes:
        key: What `visionaccel.runtime.keys.item_key` gives for the item's pixels and grid; or `EVERYTHING`.
        message: Why.
    """

    key: str
    message: str


EVERYTHING = "*"
"""Key of a fault that is about all that was encoded so far: the device answered wrongly for an unknown time."""

LOST = Fault("", "the file on which workers report faults went away during a step.")
"""What is said where the file is missing."""


def report_fault(fault: Fault) -> bool:
    """Tell the scheduler of this process's engine. False if none listens: then the caller must raise instead."""
    # The engine's process is this one or, with vLLM's multiprocess executor, the parent of this worker.
    for file in map(_board, (os.getpid(), os.getppid())):
        if file is not None and file.exists():
            line = json.dumps({"key": fault.key, "message": fault.message}) + "\n"
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
            return True
    return False


class FaultReader:
    """The scheduler's end; making it starts the listening."""

    def __init__(self) -> None:
        self._board = _board(os.getpid())
        self._read = 0
        self.close()  # What an earlier engine of this process left says nothing about this one.
        self.listen()

    def listen(self) -> None:
        """Make the file if it is not there: at the start, and when a cleaner of temporary files took it."""
        if self._board is not None and not self._board.exists():
            self._board.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._board.touch(mode=0o600)
            self._read = 0

    def new(self) -> list[Fault]:
        """Faults since the last call; one `stat` if there are none. If the file went away, a fault of unknown key."""
        if self._board is None:
            return []
        try:
            if self._board.stat().st_size == self._read:
                return []
            with self._board.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return [LOST]
        # A line that is still being written is left for the next call.
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        return [Fault(**json.loads(line)) for line in whole.splitlines()]

    def close(self) -> None:
        """Stop listening."""
        if self._board is not None:
            self._board.unlink(missing_ok=True)


def _board(process: int) -> Path | None:
    folder = board()
    return None if folder is None else folder / str(process)
