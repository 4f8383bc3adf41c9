"""The bounded queue of an encode service: items in the order of their arrival, and turns for those that want in."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from numpy.typing import NDArray

from visionaccel.core.arrays import Array
from visionaccel.core.grid import Grid

__all__ = ["Embedding", "Item", "ItemQueue", "Slots"]

Embedding: TypeAlias = NDArray[Any]
"""[tokens, out_width] of one item, read-only."""

_FEW = 64


@dataclass(eq=False)
class Item:
    """One image or video on its way through a service.

    Attributes:
        patches: [P, patch_width], as submitted; None once it is done.
        grid: Its grid.
        arrival: Items that arrived earlier go first; any clock, the same for all of a service.
        submitted: When it was submitted, on the monotonic clock.
        futures: Those that wait for it.
        key: What its embedding is kept under, once that is known.
        state: Where it is.
        alone: It shares no call with others: one that it shared did not return in time.
    """

    patches: Array
    grid: Grid
    arrival: float
    submitted: float
    futures: set[Future[Embedding]] = field(default_factory=set)
    key: str | None = None
    state: Literal["waiting", "running", "done"] = "waiting"
    alone: bool = False


class ItemQueue:
    """Items that wait for a device, the earliest arrival first. Not locked: its owner's lock guards it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []
        self._order = itertools.count()
        self._tidy_at = _FEW

    def push(self, item: Item) -> None:
        """Add an item, or add it once more at an earlier place."""
        heapq.heappush(self._heap, (item.arrival, next(self._order), item))
        if len(self._heap) > self._tidy_at:  # or what was cancelled would stay until the items before it are taken
            self._heap = [entry for entry in self._heap if entry[2].state == "waiting"]
            heapq.heapify(self._heap)
            self._tidy_at = 2 * len(self._heap) + _FEW

    def pop(self, most_patches: int) -> list[Item]:
        """Take the next item, and those after it that fit into `most_patches` with it; they are running then."""
        taken: list[Item] = []
        patches = 0
        while (head := self._head()) is not None:
            patches += head.grid.patches
            if taken and (patches > most_patches or head.alone or taken[0].alone):
                break
            heapq.heappop(self._heap)
            head.state = "running"
            taken.append(head)
        return taken

    def waiting(self) -> list[Item]:
        """All items that wait, each once, in no order."""
        return list({item: None for _, _, item in self._heap if item.state == "waiting"})

    def _head(self) -> Item | None:
        while self._heap:
            item = self._heap[0][2]
            if item.state == "waiting":
                return item
            heapq.heappop(self._heap)  # cancelled, expired, or taken from an earlier place
        return None


class Slots:
    """How many items may be in a queue, and who is next when none is free. Not locked either.

    Args:
        size: Most items.
    """

    def __init__(self, size: int) -> None:
        self.free = size
        self._turns: deque[Future[None]] = deque()

    @property
    def room(self) -> bool:
        """Whether a slot is free and nobody has asked for it before."""
        return self.free > 0 and not self._turns

    def take(self) -> bool:
        """Take a slot, if there is room."""
        if not self.room:
            return False
        self.free -= 1
        return True

    def ask(self) -> Future[None]:
        """A turn that is done as soon as a slot is its holder's. Cancel it, or give the slot back."""
        turn: Future[None] = Future()
        self._turns.append(turn)
        return turn

    def give(self) -> list[Future[None]]:
        """Hand free slots to those that asked first; for the owner to complete once it has let go of its lock."""
        given = []
        while self.free > 0 and self._turns:
            turn = self._turns.popleft()
            if turn.set_running_or_notify_cancel():
                self.free -= 1
                given.append(turn)
        return given

    def refuse(self) -> list[Future[None]]:
        """Take back every turn that is still open, for the owner to fail."""
        turns = [turn for turn in self._turns if turn.set_running_or_notify_cancel()]
        self._turns.clear()
        return turns
