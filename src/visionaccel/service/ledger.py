"""What is in an encode service, under one lock: who waits for which item, and where each item is."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from visionaccel.errors import DeadlineError, ServiceClosedError, VisionAccelError
from visionaccel.service.queue import Embedding, Item, ItemQueue, Slots

__all__ = ["Ledger", "ServiceCounters"]

Turns = list[Future[None]]
Answers = list[tuple[Future[Embedding], Embedding | VisionAccelError]]


@dataclass(frozen=True)
class ServiceCounters:
    """What a service has done so far, and what it is about.

    Attributes:
        submitted: Items that were taken in.
        encoded: Items that a device or the fallback encoded.
        fallback: Those of them that the fallback encoded.
        cached: Items whose embedding was in the cache.
        merged: Items that were equal to one in the service, and were not encoded a second time.
        failed: Items that could not be encoded, those past a deadline included.
        expired: Items past a deadline.
        cancelled: Items that nobody wanted any more before a device took them.
        busy_seconds: Seconds that devices spent on items, over all devices.
        waiting: Items that wait for a device now.
        running: Items that devices encode now.
    """

    submitted: int = 0
    encoded: int = 0
    fallback: int = 0
    cached: int = 0
    merged: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    busy_seconds: float = 0.0
    waiting: int = 0
    running: int = 0


class Ledger:
    """The state of an encode service. Each method takes the lock; futures are answered after it was let go.

    An item comes in through `enter`, is looked at once through `incoming` and `place`, is taken by a device through
    `take`, and done by `finish`; or it is failed, expired or cancelled before.

    Args:
        size: Most items that wait.
    """

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._ready = threading.Condition(self._lock)
        self._slots = Slots(size)
        self._incoming: deque[Item] = deque()
        self._queue = ItemQueue()
        self._by_key: dict[str, Item] = {}
        self._items: dict[Future[Embedding], Item] = {}
        self._counters = ServiceCounters()
        self._closed = False

    @property
    def counters(self) -> ServiceCounters:
        """A snapshot."""
        with self._lock:
            return self._counters

    @property
    def room(self) -> bool:
        """Whether an item would be taken in at once."""
        with self._lock:
            return self._slots.room and not self._closed

    @property
    def closed(self) -> bool:
        """Whether nothing is taken in any more."""
        return self._closed

    def slot(self) -> bool:
        """Take a slot for an item; False if none is free.

        Raises:
            ServiceClosedError: If the service is closed.
        """
        with self._lock:
            self._require_open()
            return self._slots.take()

    def turn(self) -> Future[None]:
        """Ask for a slot; the future is done when it is there. Give it back, or cancel it, if it is not used.

        Raises:
            ServiceClosedError: If the service is closed.
        """
        with self._lock:
            self._require_open()
            turn = self._slots.ask()
            given = self._slots.give()
        _complete(given)
        return turn

    def give_back(self, turn: Future[None]) -> None:
        """Nobody waits for this turn any more; it may have come in the meantime."""
        if turn.cancel() or turn.exception() is not None:
            return
        with self._lock:
            given = self._free_slots(1)
        _complete(given)

    def enter(self, item: Item) -> Future[Embedding]:
        """Take in an item that has a slot.

        Raises:
            ServiceClosedError: If the service is closed.
        """
        future: Future[Embedding] = Future()
        with self._lock:
            self._require_open()
            item.futures.add(future)
            self._items[future] = item
            self._count(submitted=1, waiting=1)
            self._incoming.append(item)
            self._arrived.notify()
        future.add_done_callback(self._cancelled)
        return future

    def incoming(self) -> Item | None:
        """The next item that came in, once there is one; None if there will be none any more."""
        with self._lock:
            while not self._incoming and not self._closed:
                self._arrived.wait()
            return self._incoming[0] if self._incoming else None

    def place(self, item: Item, key: str | None, known: Embedding | VisionAccelError | None) -> None:
        """Put an item that came in where it belongs: with its equal, into the queue, or done if its answer is known."""
        with self._lock:
            if self._incoming and self._incoming[0] is item:
                self._incoming.popleft()
                if self._closed and not self._incoming:
                    self._ready.notify_all()
            if item.state != "waiting":  # nobody wants it any more
                return
            item.key = key
            twin = self._by_key.get(key) if key is not None else None
            answers: Answers = []
            if known is None and twin is None:
                assert key is not None
                self._by_key[key] = item
                self._queue.push(item)
                self._ready.notify()
                return
            given = self._leave_queue([item])
            if known is not None:
                self._count(**{"failed" if isinstance(known, VisionAccelError) else "cached": 1})
                answers = self._done([item], [known])
            elif twin is not None:
                self._count(merged=1)
                self._join(item, twin)
        _complete(given)
        _answer(answers)

    def take(self, most_patches: int) -> list[Item]:
        """Items for one call of a device, once there are any; [] if there will be none any more."""
        with self._lock:
            while not (items := self._queue.pop(most_patches)):
                if self._closed and not self._incoming:
                    return []
                self._ready.wait()
            given = self._leave_queue(items)
            self._count(running=len(items))
        _complete(given)
        return items

    def finish(
        self, items: Sequence[Item], results: Sequence[Embedding | VisionAccelError | None], **counted: float
    ) -> None:
        """A call of a device has returned.

        Args:
            items: What it was given.
            results: The answer of each; None for one that is to wait once more, for a call of its own.
            counted: What it adds to the counters.
        """
        with self._lock:
            self._count(running=-len(items), **counted)
            again = [item for item, result in zip(items, results, strict=True) if result is None]
            self._wait_again([item for item in again if item.futures])
            unwanted = [item for item in again if not item.futures]
            self._count(cancelled=len(unwanted))
            self._done(unwanted, [])
            ended = [(item, result) for item, result in zip(items, results, strict=True) if result is not None]
            failed = sum(isinstance(result, VisionAccelError) and bool(item.futures) for item, result in ended)
            late = sum(isinstance(result, DeadlineError) and bool(item.futures) for item, result in ended)
            self._count(failed=failed, expired=late)
            answers = self._done([item for item, _ in ended], [result for _, result in ended])
        _answer(answers)

    def fail_waiting(self, longer_than: float, error: VisionAccelError) -> None:
        """Fail what has waited for longer than that many seconds."""
        now = time.monotonic()
        with self._lock:
            items = [item for item in self._queue.waiting() if now - item.submitted >= longer_than]
            given = self._leave_queue(items)
            self._count(failed=len(items), expired=len(items))
            answers = self._done(items, [error] * len(items))
        _complete(given)
        _answer_apart(answers)

    def expire(self, future: Future[Embedding], error: VisionAccelError) -> None:
        """The deadline of one that waits for an item has passed."""
        with self._lock:
            item = self._items.pop(future, None)
            if item is None:
                return
            self._count(failed=1, expired=1)
            given = self._let_go(item, future)
        _complete(given)
        _answer_apart([(future, error)])

    def close(self, *, drain: bool) -> None:
        """Take nothing in any more; what waits is failed, or left for the devices."""
        error = ServiceClosedError("the encode service is closed.", hint="Open a new one.")
        with self._lock:
            self._closed = True
            answers: Answers = []
            if not drain:
                dropped = [item for item in (*self._incoming, *self._queue.waiting()) if item.state == "waiting"]
                self._incoming.clear()
                self._leave_queue(dropped)
                answers = self._done(dropped, [error] * len(dropped))
            refused = self._slots.refuse()
            self._arrived.notify_all()
            self._ready.notify_all()
        for turn in refused:
            turn.set_exception(error)
        _answer(answers)

    def abandon(self) -> None:
        """Fail whatever is left: calls that do not return."""
        error = ServiceClosedError("the encode service was closed while the item was encoded.", hint="Open a new one.")
        with self._lock:
            items = list(dict.fromkeys(self._items.values()))
            self._leave_queue([item for item in items if item.state == "waiting"])
            answers = self._done(items, [error] * len(items))
        _answer(answers)

    def _cancelled(self, future: Future[Embedding]) -> None:
        """A future is done; if its holder cancelled it, the item may not be wanted any more."""
        if not future.cancelled():
            return
        with self._lock:
            item = self._items.pop(future, None)
            given = self._let_go(item, future) if item is not None else []
        _complete(given)

    # With the lock held:

    def _require_open(self) -> None:
        if self._closed:
            raise ServiceClosedError("the encode service is closed.", hint="Open a new one.")

    def _join(self, item: Item, twin: Item) -> None:
        """Have those that wait for an item wait for its equal."""
        for future in item.futures:
            self._items[future] = twin
        twin.futures |= item.futures
        item.futures, item.state = set(), "done"
        if item.arrival < twin.arrival and twin.state == "waiting":
            twin.arrival = item.arrival
            self._queue.push(twin)

    def _wait_again(self, items: Sequence[Item]) -> None:
        for item in items:
            item.state, item.alone = "waiting", True
            self._slots.free -= 1
            self._queue.push(item)
        self._count(waiting=len(items))
        self._ready.notify_all()

    def _let_go(self, item: Item, future: Future[Embedding]) -> Turns:
        """One that waited for an item does so no more; an item that waits for a device and for nobody else is done."""
        item.futures.discard(future)
        if item.futures or item.state != "waiting":
            return []
        self._count(cancelled=1)
        given = self._leave_queue([item])
        self._done([item], [])
        return given

    def _leave_queue(self, items: Sequence[Item]) -> Turns:
        self._count(waiting=-len(items))
        return self._free_slots(len(items))

    def _free_slots(self, number: int) -> Turns:
        self._slots.free += number
        return [] if self._closed else self._slots.give()

    def _done(self, items: Sequence[Item], results: Sequence[Embedding | VisionAccelError]) -> Answers:
        """Close the books of items: nobody joins them any more. What is to be told to whom."""
        answers: Answers = []
        for place, item in enumerate(items):
            item.state = "done"
            item.patches = None  # the queue may still have an entry of it
            if item.key is not None and self._by_key.get(item.key) is item:
                del self._by_key[item.key]
            for future in item.futures:
                del self._items[future]
                answers.append((future, results[place]))
            item.futures = set()
        return answers

    def _count(self, **more: float) -> None:
        values = {name: getattr(self._counters, name) + amount for name, amount in more.items()}
        self._counters = replace(self._counters, **values)


def _complete(turns: Turns) -> None:
    for turn in turns:
        turn.set_result(None)


def _answer_apart(answers: Answers) -> None:
    """Answer from another thread: callbacks of futures may take their time, and the thread of deadlines has none."""
    if answers:
        threading.Thread(target=_answer, args=(answers,), name="visionaccel-answers", daemon=True).start()


def _answer(answers: Answers) -> None:
    for future, result in answers:
        if not future.set_running_or_notify_cancel():
            continue  # cancelled since the lock was let go
        if isinstance(result, VisionAccelError):
            future.set_exception(result)
        else:
            future.set_result(result)
