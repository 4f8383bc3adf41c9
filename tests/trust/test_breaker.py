"""The breaker: when a device gets work."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from visionaccel.trust import Breaker, BreakerState


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_it_opens_after_failures_in_a_row_and_successes_start_the_count_anew(clock):
    breaker = Breaker(failures=3, clock=clock)
    for _ in range(4):
        breaker.failed("it hung")
        breaker.failed("it hung")
        breaker.succeeded()
    assert breaker.closed
    for _ in range(3):
        breaker.failed("it hung")
    assert breaker.state is BreakerState.OPEN
    assert breaker.reason == "3 encodes in a row failed, the last because it hung"
    assert not breaker.proven


def test_only_a_probe_closes_it_and_it_is_probed_later_each_time(clock):
    seen = []
    breaker = Breaker(cool_down=20.0, changed=lambda state, reason: seen.append((state, reason)), clock=clock)
    breaker.trip("it answers wrongly")
    assert breaker.proven
    for wait in (20.0, 40.0, 60.0, 60.0):
        clock.now += wait - 0.01
        assert not breaker.begin_probe()
        clock.now += 0.01
        assert breaker.begin_probe()
        assert not breaker.begin_probe(), "one probe at a time"
        breaker.end_probe("still wrong")
    clock.now += 60.0
    assert breaker.begin_probe()
    breaker.end_probe(None)
    assert breaker.closed
    assert seen[0] == (BreakerState.OPEN, "it answers wrongly")
    assert seen[-1] == (BreakerState.CLOSED, "the probe passed")
    breaker.succeeded()
    breaker.trip("again")
    clock.now += 20.0
    assert breaker.begin_probe(), "a success in between starts the delays again"


def test_a_probe_that_passes_does_not_close_what_was_opened_proven_meanwhile(clock):
    breaker = Breaker(clock=clock)
    breaker.trip("it hangs")
    clock.now += 1.0
    assert breaker.begin_probe()
    breaker.trip("the reference does not agree")
    breaker.end_probe(None)
    assert breaker.state is BreakerState.OPEN
    assert breaker.reason == "the reference does not agree"


def test_doubt_about_a_device_that_failed_often_is_not_lost(clock):
    breaker = Breaker(failures=1, clock=clock)
    breaker.failed("it hung")
    assert not breaker.proven
    breaker.trip("it answers wrongly")
    assert breaker.proven
    assert breaker.reason == "it answers wrongly"


def test_it_knows_how_long_a_call_hangs_until_a_probe_passes(clock):
    breaker = Breaker(clock=clock)
    breaker.trip("it answers wrongly")
    assert breaker.hangs_for == 0
    breaker.trip("it hangs", hangs=True)
    clock.now += 5.0
    breaker.trip("it hangs again", hangs=True)
    assert breaker.hangs_for == 5.0
    assert breaker.begin_probe()
    breaker.end_probe("it hangs still")
    assert breaker.hangs_for == 5.0
    clock.now += 60.0
    assert breaker.begin_probe()
    breaker.end_probe(None)
    assert breaker.hangs_for == 0


class Machine(RuleBasedStateMachine):
    """Whatever happens, work is given to a device only in the state `closed`, which only a probe brings back."""

    def __init__(self):
        super().__init__()
        self.clock, self.told = Clock(), [BreakerState.CLOSED]
        self.breaker = Breaker(
            failures=2, cool_down=8.0, changed=lambda state, _: self.told.append(state), clock=self.clock
        )
        self.probing = False

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def succeed(self):
        before = self.breaker.state
        self.breaker.succeeded()
        assert self.breaker.state is before

    @rule()
    def fail(self):
        before = self.breaker.state
        self.breaker.failed("x")
        assert self.breaker.state in (before, BreakerState.OPEN)

    @rule(hangs=st.booleans())
    def trip(self, hangs):
        self.breaker.trip("y", hangs=hangs)
        assert self.breaker.state is BreakerState.OPEN

    @rule()
    def begin(self):
        was = self.breaker.state
        if self.breaker.begin_probe():
            assert was is BreakerState.OPEN
            self.probing = True
            assert self.breaker.state is BreakerState.HALF_OPEN

    @precondition(lambda self: self.probing)
    @rule(passes=st.booleans())
    def end(self, passes):
        was = self.breaker.state
        self.breaker.end_probe(None if passes else "z")
        self.probing = False
        closes = passes and was is BreakerState.HALF_OPEN
        assert self.breaker.closed == (closes or was is BreakerState.CLOSED)

    @invariant()
    def what_works_does_not_hang(self):
        assert not (self.breaker.closed and (self.breaker.hangs_for or self.breaker.proven))

    @invariant()
    def what_was_told_last_is_the_state(self):
        assert self.told[-1] is self.breaker.state


TestMachine = Machine.TestCase
