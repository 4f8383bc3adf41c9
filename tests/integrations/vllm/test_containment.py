"""No order of scheduling, aborts, preemption and caching lets a token through that was computed from a faulty encode.

vLLM's real schedulers, synchronous and asynchronous, drive a worker that is modelled by what depends on what: which
encoder outputs it holds, and which slots of the key-value cache were computed from a faulty one.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from modelled_engine import GOOD, GRID, IMAGE_TOKENS, IMAGES, TAINTED, Engine, forget, make, pixels
from visionaccel.integrations.vllm.compat import engine_config
from visionaccel.integrations.vllm.shared_memory import _VARIABLE as MEMORY
from visionaccel.integrations.vllm.shared_memory import (
    ALL_ITEMS,
    FAULTS,
    Fault,
    make_shared_memory,
    report_fault,
    shared_memory,
)
from visionaccel.service import item_key

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations


@pytest.fixture(scope="module", params=["sync", "async"])
def scheduler(request, digits):
    """A contained scheduler of vLLM's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MEMORY, "")
        make_shared_memory()
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        scheduler = make(digits, request.param, pipelined=False)
        yield scheduler
        scheduler.shutdown()


@pytest.fixture
def engine(scheduler):
    forget(scheduler)
    return Engine(scheduler)


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.lists(st.integers(0, IMAGES - 1), max_size=3), st.integers(1, 20)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 5)),
    st.tuples(st.just("break"), st.sets(st.integers(0, IMAGES - 1))),
)


def play(scheduler, actions):
    """An engine that has been through some actions; its requests, and the images whose encode ever failed."""
    forget(scheduler)
    engine = Engine(scheduler)
    names, ever_broken = [], set()
    for action, *values in actions:
        if action == "add":
            names.append(engine.add(*values))
        elif action == "step":
            for _ in range(values[0]):
                engine.step()
        elif action == "abort" and names:
            engine.abort(names[values[0] % len(names)])
        elif action == "break":
            engine.worker.broken = values[0]
            ever_broken |= values[0]
        elif action == "lie":
            engine.worker.lying = values[0]
    return engine, names, ever_broken


@given(actions=st.lists(ACTIONS, min_size=4, max_size=40))
@hypothesis_settings(max_examples=150)
def test_no_token_of_a_faulty_encode_is_ever_delivered(scheduler, actions):
    engine, names, _ = play(scheduler, actions)
    engine.drain()
    assert not any(TAINTED in tokens for tokens in engine.answers.values())
    assert set(engine.endings) == set(names)
    for name, ending in engine.endings.items():
        if ending == "length":
            assert engine.answers[name] == [GOOD] * 3

    # With the device well again, every image is right again, whatever the caches hold.
    engine.worker.broken = set()
    again = [engine.add([image, image], 5) for image in range(IMAGES)]
    engine.drain()
    assert all(engine.answers[name] == [GOOD] * 3 and engine.endings[name] == "length" for name in again)


def test_workers_report_to_the_engine_of_their_own_configuration(scheduler):
    config = scheduler.vllm_config
    assert engine_config.served_model(config).engine == str(config.instance_id) != ""
    assert scheduler._faults.new() == []
    assert report_fault(Fault("k", "m"), engine_config.served_model(config).engine)
    assert scheduler._faults.new() == [Fault("k", "m")]


def test_only_requests_with_the_faulty_image_fail(engine):
    engine.worker.broken = {1}
    names = [engine.add([0], 3), engine.add([1], 3), engine.add([2, 1], 3), engine.add([], 6)]
    engine.drain()
    assert [engine.endings[name] for name in names] == ["length", "error", "error", "length"]
    assert [engine.answers[name] for name in names] == [[GOOD] * 3, [], [], [GOOD] * 3]


def test_an_image_is_known_by_pixels_that_the_model_has_cast(engine, monkeypatch):
    encode = engine.worker.encode

    def cast(identifier):
        image = int(identifier.removeprefix("image"))
        if image == 1:
            key = item_key(pixels(image).bfloat16(), GRID)
            assert report_fault(Fault(key, "image 1 is broken"), engine.worker.engine)
            return False
        return encode(identifier)

    monkeypatch.setattr(engine.scheduler, "_dtype", torch.bfloat16)
    engine.worker.encode = cast
    names = [engine.add([0], 3), engine.add([1], 3)]
    engine.drain()
    assert [engine.endings[name] for name in names] == ["length", "error"]


def test_a_request_that_read_the_image_before_its_device_broke_goes_on(engine):
    first = engine.add([1], 3)
    engine.step()
    engine.step()
    assert engine.scheduler.requests[first].num_computed_tokens > IMAGE_TOKENS + 2
    engine.worker.broken = {1}
    engine.scheduler.encoder_cache_manager.reset()
    engine.worker.outputs.clear()
    second = engine.add([3, 1], 3)
    engine.drain()
    assert (engine.endings[first], engine.endings[second]) == ("length", "error")


def test_a_report_that_cannot_be_read_ends_what_is_in_flight_and_nothing_later(engine):
    encode = engine.worker.encode

    def garbled(identifier):
        encode(identifier)
        for area in shared_memory().areas(FAULTS):
            shared_memory().memory[area.start : area.start + FAULTS.area_bytes] = bytes(FAULTS.area_bytes)

    engine.worker.encode, engine.worker.broken = garbled, {1}
    names = [engine.add([1], 3), engine.add([], 6)]
    engine.drain()
    assert [engine.answers[name] for name in names] == [[], [GOOD] * 3]
    assert "could not be read" in engine.reasons[names[0]]
    engine.worker.encode, engine.worker.broken = encode, set()
    again = engine.add([1], 3)
    engine.drain()
    assert (engine.answers[again], engine.endings[again]) == ([GOOD] * 3, "length")


def test_what_was_computed_from_a_device_that_lied_is_computed_anew_once_that_turns_out(engine):
    engine.worker.lying = {0, 1}
    kept, running = engine.add([0], 3), engine.add([1, 0], 3)
    while not engine.answers[kept] or not engine.answers[running]:
        engine.step()
    assert engine.answers[running][0] == TAINTED, "nobody could know"
    engine.worker.lying = set()
    assert report_fault(Fault(ALL_ITEMS, "its canary failed"), engine.worker.engine)
    known = {name: list(tokens) for name, tokens in engine.answers.items()}
    again = [engine.add([image], 3) for image in range(IMAGES)]
    waiting = engine.add([], 6)
    engine.drain()
    assert all(engine.answers[name] == [GOOD] * 3 for name in (*again, waiting))
    for name, tokens in known.items():
        assert engine.endings[name] == "error", "what was said cannot be taken back"
        assert "failed its self-check" in engine.reasons[name]
        assert engine.answers[name] == tokens, "and nothing follows"


def test_what_has_no_token_yet_is_computed_anew_and_text_alone_goes_on(engine):
    engine.worker.lying = {0}
    text, image = engine.add([], 6), engine.add([0], 40)
    while not engine.answers[text]:
        engine.step()
    assert engine.answers[image] == []
    engine.worker.lying = set()
    assert report_fault(Fault(ALL_ITEMS, "its canary failed"), engine.worker.engine)
    engine.drain()
    assert (engine.answers[text], engine.endings[text]) == ([GOOD] * 3, "length")
    assert (engine.answers[image], engine.endings[image]) == ([GOOD] * 3, "length")


LIES = st.one_of(ACTIONS, st.tuples(st.just("lie"), st.sets(st.integers(0, IMAGES - 1))))


@given(actions=st.lists(LIES, min_size=4, max_size=40))
@hypothesis_settings(max_examples=100)
def test_after_distrust_every_later_request_is_right_whatever_the_caches_held(scheduler, actions):
    engine, names, ever_broken = play(scheduler, actions)
    engine.worker.broken = engine.worker.lying = set()
    assert report_fault(Fault(ALL_ITEMS, "its canary failed"), engine.worker.engine)
    again = [engine.add([image, image], 5) for image in range(IMAGES)]
    engine.drain()
    assert set(engine.endings) == {*names, *again}
    for image, name in enumerate(again):
        if (
            engine.endings[name] == "error"
        ):  # a fault of before, reported meanwhile: one error too many is no wrong answer
            assert image in ever_broken
        else:
            assert (engine.answers[name], engine.endings[name]) == ([GOOD] * 3, "length")


def test_a_request_whose_first_token_is_under_way_is_computed_anew_and_does_not_fail(engine):
    """As where a restarted device is found to lie in the step that was to answer."""
    engine.worker.lying = {0}
    encode, told = engine.worker.encode, []

    def found_out(identifier):
        right = encode(identifier)
        if not told:
            told.append(report_fault(Fault(ALL_ITEMS, "its canary failed"), engine.worker.engine))
            engine.worker.lying = set()
        return right

    engine.worker.encode = found_out
    name = engine.add([0], 3)
    engine.drain()
    assert told == [True]
    assert (engine.answers[name], engine.endings[name]) == ([GOOD] * 3, "length")
