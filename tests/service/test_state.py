"""What holds of a service's items after every step of any schedule."""

import itertools
import math
import time

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from visionaccel.core.grid import Grid
from visionaccel.errors import DeadlineError, DeviceError, ServiceClosedError
from visionaccel.service.cache import EmbeddingCache
from visionaccel.service.state import Item, ServiceState
from visionaccel.trust import Embedded

GRID = Grid(1, 2, 2)
SIZE = 3


class Machine(RuleBasedStateMachine):
    """One thread that plays callers, devices and the one who closes, in any order."""

    def __init__(self):
        super().__init__()
        self.cache = EmbeddingCache(2**10)
        self.state = ServiceState(SIZE, self.cache)
        self.order = itertools.count()
        self.wanted = {}  # each open future, and its key
        self.running = []
        self.submitted = 0
        self.closed = self.drains = False

    def settle(self, keys, answer=None):
        """Check that the futures of these keys have ended, as they should."""
        for future in [future for future, key in self.wanted.items() if key in keys]:
            assert future.done()
            if answer is not None:
                found = future.exception() or future.result()
                assert found is answer
            else:
                assert isinstance(future.exception(), ServiceClosedError)
            del self.wanted[future]

    @rule(key=st.sampled_from("abcde"), arrival=st.integers(0, 3), urgent=st.booleans())
    def submit(self, key, arrival, urgent):
        in_service, cached = key in self.wanted.values() or key in self.keys(), self.cache.get(key)
        item = Item(key, np.zeros(1), GRID, arrival, urgent, next(self.order))
        try:
            future = self.state.enter(item)
        except ServiceClosedError:
            assert self.closed
            return
        if future is None:
            assert not in_service
            assert cached is None
            assert self.state.counters.waiting == SIZE
            return
        assert not self.closed
        self.submitted += 1
        if cached is not None and not in_service:
            assert future.result(0) is cached
        else:
            self.wanted[future] = key

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def cancel(self, data):
        future = data.draw(st.sampled_from(list(self.wanted)))
        assert future.cancel()
        del self.wanted[future]

    @precondition(lambda self: self.state.counters.waiting)
    @rule(ready=st.booleans())
    def take(self, ready):
        waiting = self.waiting()
        if not (ready or self.closed):
            return  # it would wait
        item = self.state.take(lambda: 0.0 if ready else math.inf)
        first = min(waiting, key=lambda each: (not each.urgent, each.arrival, each.submitted))
        assert item is first
        assert item.patches is not None
        self.running.append(item)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), answer=st.sampled_from(["right", "error", "late"]))
    def finish(self, data, answer):
        item = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if answer == "right":
            result = np.zeros((1, 4), np.float32)
            self.cache.put(item.key, result)
            found = Embedded(result)
        else:
            found = result = DeviceError("gone") if answer == "error" else DeadlineError("late")
        open_before = item.key in self.keys()
        self.state.finish(item, found, 0.1)
        if open_before:
            self.settle({item.key}, result)

    @precondition(lambda self: not self.closed)
    @rule(drain=st.booleans())
    def close(self, drain):
        dropped = set() if drain else {item.key for item in self.waiting()}
        self.state.close(drain=drain)
        self.closed, self.drains = True, drain
        self.settle(dropped)

    @precondition(lambda self: self.closed)
    @rule()
    def abandon(self):
        self.state.abandon()
        self.running = []
        self.settle(set("abcde"))
        assert self.wanted == {}

    def waiting(self):
        return list(self.state._waiting)

    def keys(self):
        return set(self.state._by_key)

    @invariant()
    def at_most_size_items_wait(self):
        waiting = self.waiting()
        assert len(waiting) <= SIZE
        assert self.state.room == (len(waiting) < SIZE and not self.closed)
        assert self.closed <= (self.drains or not waiting)

    @invariant()
    def an_item_is_in_one_place_and_answers_the_futures_of_its_key(self):
        by_key = self.state._by_key
        assert set(by_key.values()) == {*self.waiting(), *self.running}
        assert len(by_key) == len(self.waiting()) + len(self.running)
        futures = {future: key for key, item in by_key.items() for future in item.futures}
        assert futures == self.wanted
        assert not any(future.done() for future in futures)
        assert all(item.futures and item.patches is not None for item in self.waiting())

    @invariant()
    def every_item_is_counted(self):
        counters = self.state.counters
        assert counters.submitted == self.submitted
        assert (counters.waiting, counters.running) == (len(self.waiting()), len(self.running))
        ended = counters.encoded + counters.failed + counters.cancelled
        assert counters.cached + counters.merged + ended + counters.waiting + counters.running <= counters.submitted


TestMachine = Machine.TestCase


def test_an_equal_item_needs_no_room():
    state = ServiceState(1, EmbeddingCache(0))
    first = state.enter(Item("a", np.zeros(1), GRID, 0.0))
    assert state.enter(Item("b", np.zeros(1), GRID, 0.0)) is None
    second = state.enter(Item("a", np.zeros(1), GRID, 0.0))
    item = state.take(lambda: 0.0)
    state.finish(item, Embedded(np.zeros((1, 4), np.float32)), 0.0)
    assert first.result(0) is second.result(0)


def test_a_change_is_done_once_there_may_be_room_and_no_waiter_ends_it_for_others():
    state = ServiceState(1, EmbeddingCache(0))
    state.enter(Item("a", np.zeros(1), GRID, 0.0))
    change = state.change
    assert state.enter(Item("b", np.zeros(1), GRID, 0.0)) is None
    assert not change.cancel()
    assert not change.done()
    state.take(lambda: 0.0)
    assert change.done()
    change = state.change
    state.close(drain=False)
    assert change.done()


def test_an_item_that_must_wait_first_is_taken_once_it_has_waited():
    state = ServiceState(1, EmbeddingCache(0))
    state.enter(Item("a", np.zeros(1), GRID, 0.0))
    started = time.monotonic()
    assert state.take(lambda: 0.1).key == "a"
    assert 0.05 < time.monotonic() - started < 10
