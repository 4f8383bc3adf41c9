"""Calls that may hang: each ends at its limit, and none begins behind one that was left behind."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gated import wait_until
from visionaccel.trust.threads import LateError, WatchedCalls

LIMIT = 0.05


@pytest.fixture(scope="module", autouse=True)
def a_call_that_was_ended_returns_soon():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionaccel.trust.threads._RETURNING", 0.1)
        yield


def outcome(call, *given, **named):
    """What a call returns or raises."""
    try:
        return call(*given, **named)
    except Exception as error:
        return error


def test_a_call_that_is_left_behind_does_not_hold_up_the_next():
    calls, gate = WatchedCalls(), threading.Event()
    with pytest.raises(LateError):
        calls.call(gate.wait, 0.05, places=2)
    assert calls.call(lambda: 7, 5, places=2) == 7
    with pytest.raises(TimeoutError, match="of its own"):
        calls.call(lambda: (_ for _ in ()).throw(TimeoutError("of its own")), 5, places=2)
    assert calls.call(lambda: 8, 5, places=2) == 8
    gate.set()
    calls.close()


@hypothesis_settings(max_examples=25)
@given(
    schedule=st.lists(st.sampled_from(["right", "error", "hang", "ends", "does not end"]), min_size=1, max_size=8),
    places=st.sampled_from([1, 2]),
)
def test_a_call_ends_at_its_limit_and_none_begins_behind_too_many(schedule, places):
    held, returned, began = threading.Event(), [], []
    calls = WatchedCalls(lambda: returned.append(True))

    def play(action, ended):
        began.append(action)
        if action == "error":
            raise ValueError("of its own")
        if action == "ends":
            assert ended.wait(20)
        elif action != "right":
            held.wait(30)
        return action

    late, most_late = 0, 1 if places == 1 else 4
    for action in schedule:
        begun, started, ended = len(began), time.monotonic(), threading.Event()

        def end(action=action, ended=ended):
            ended.set()
            return action in ("ends", "does not end")

        found = outcome(calls.call, partial(play, action, ended), LIMIT, places=places, end=end)
        if late == most_late:
            assert len(began) == begun
            assert isinstance(found, LateError)
        elif action in ("hang", "does not end"):
            assert type(found) is LateError
            late += 1
        elif action == "error":
            assert type(found) is ValueError
        else:
            assert found == action
        assert time.monotonic() - started < LIMIT + 5
        assert calls.late == (late > 0)
    held.set()
    wait_until(lambda: len(returned) == late)
    assert not calls.late
    assert calls.call(lambda: 7, 5) == 7
    calls.close()


def test_who_waits_behind_a_call_that_is_left_behind_does_not_wait_on():
    calls, held = WatchedCalls(), threading.Event()
    with ThreadPoolExecutor(4) as pool:
        started = time.monotonic()
        asked = [pool.submit(calls.call, lambda: held.wait(30), 0.3) for _ in range(4)]
        assert all(isinstance(each.exception(20), LateError) for each in asked)
        assert time.monotonic() - started < 0.3 + 5
    held.set()
    calls.close()


def test_an_error_while_a_call_is_ended_leaves_it_behind():
    calls, held = WatchedCalls(), threading.Event()

    def end():
        raise ValueError("interrupted")

    with pytest.raises(ValueError, match="interrupted"):
        calls.call(lambda: held.wait(30), 0.05, end=end)
    with pytest.raises(LateError, match="An earlier call has not returned"):
        calls.call(lambda: 7, 5)
    held.set()
    wait_until(lambda: not calls.late)
    assert calls.call(lambda: 7, 5) == 7
    calls.close()
