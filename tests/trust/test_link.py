"""A link of a chain: every call ends in time or the link is disabled, and what failed to open may work later."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bundles import write_bundle
from gated import Gate, gated, image, refuse_once, wait_until
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.backends import default_registry
from visionaccel.bundle import open_bundle
from visionaccel.core.grid import Grid
from visionaccel.encoder import Encoder, OpenProgram, open_tower
from visionaccel.errors import ConfigurationError, DeadlineError, DeviceError, DeviceLostError, VisionAccelError
from visionaccel.service import EncodeService, open_guarded, open_service
from visionaccel.service import assembly as opening
from visionaccel.settings import Settings
from visionaccel.trust import ChainLink, GuardedEncoder
from visionaccel.trust.threads import Background

GRID = (1, 4, 4)


def gate_of(encoder):
    """Puts a gate into an open encoder."""
    (opened,) = encoder.programs
    opened.session = Gate(opened.session)
    return opened.session


@pytest.fixture
def openings(monkeypatch):
    """What `open_guarded` opens, one list of what happens for each backend: an error to raise, or a function of the
    encoder; and the names of what was opened."""
    scripts, opened = {}, []

    def open_scripted(source, *, backend, **kinds):
        opened.append(backend)
        script = scripts.get(backend, [])
        action = script.pop(0) if script else None
        if isinstance(action, Exception):
            raise action
        encoder = open_encoder(source, backend=backend, **kinds)
        if action is not None:
            action(encoder)
        return encoder

    monkeypatch.setattr(opening, "open_encoder", open_scripted)
    return scripts, opened


# A hang


@pytest.mark.parametrize("mode", ["in-line", "pipelined"])
def test_an_in_process_fallback_that_hangs_behind_an_isolated_device_is_left_and_its_successor_answers(
    tiny, tmp_path, mode, openings
):
    switch, gates = tmp_path / "switch.json", []
    scripts, _ = openings
    scripts["onnxrt"] = [lambda encoder: (gates.append(gate_of(encoder)), gates[0].shut())]
    settings = Settings(
        backend="simulated", device="torch_ref", options={"switch": str(switch)}, isolation="process",
        fallback="onnxrt, torch_ref", deadline=1.0, breaker_seconds=60, canary="off",
    )  # fmt: skip
    real = opening.open_encoder

    def in_this_process(source, *, backend, isolation, **kinds):
        return real(source, backend=backend, isolation=isolation if backend == "simulated" else "none", **kinds)

    opening.open_encoder = in_this_process  # put back by the fixture
    (guarded,) = open_guarded(open_tower(tiny), settings, settings.wanted_devices)
    switch.write_text('[{"all": true, "do": "exit"}]')
    patches = image(3)
    if mode == "in-line":
        (answer,) = guarded.encode_items(patches, [GRID])
        rows = answer.rows
    else:
        with EncodeService([guarded]) as service:
            rows = service.submit(patches, GRID).result(20)
    np.testing.assert_allclose(rows, reference(tiny, patches, [GRID]), rtol=0, atol=2e-5)
    assert not guarded.links[1].breaker.closed, "the one that hangs is disabled"
    started = time.monotonic()
    guarded.close()
    assert time.monotonic() - started < 8
    assert gates[0].inside == 1, "its call never returned"
    gates[0].let_in()


def in_a_process(tiny, tmp_path, **options):
    """A chain of one simulated device in a child process, and its switch."""
    switch = tmp_path / "switch.json"
    settings = Settings(
        backend="simulated", device="onnxrt", options={"switch": str(switch), **options}, isolation="process",
        fallback="none", deadline=1.0, canary="off",
    )  # fmt: skip
    (guarded,) = open_guarded(open_tower(tiny), settings, ("onnxrt",))
    return guarded, switch


def test_a_process_has_the_deadline_of_each_image_too(tiny, tmp_path):
    guarded, _ = in_a_process(tiny, tmp_path, per_patch=0.03)
    answers = guarded.encode_items(random_patches([GRID] * 4), [GRID] * 4)  # nearly two seconds
    assert not any(isinstance(answer, VisionAccelError) for answer in answers)
    assert guarded.links[0].restarts == 0
    guarded.close()


def test_a_process_that_hangs_is_ended_at_the_links_deadline_and_the_next_one_gets_work(tiny, tmp_path):
    guarded, switch = in_a_process(tiny, tmp_path)
    switch.write_text('[{"all": true, "do": "hang"}]')
    started = time.monotonic()
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert 1.0 <= time.monotonic() - started < 1.0 + 5
    assert isinstance(answer, DeviceLostError)
    assert "did not answer within 1 s. Its call was ended" in answer.message
    switch.write_text("")
    (link,) = guarded.links
    assert link.ready, "it need not be probed: its process is another one"
    wait_until(lambda: link.restarts == 1)
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert not isinstance(answer, VisionAccelError)
    guarded.close()


def test_only_the_process_with_the_call_is_ended(tiny, tmp_path):
    folder = write_bundle(tiny, tmp_path / "bundle", "6x10", "10x6")
    switch = tmp_path / "switch.json"
    settings = Settings(
        backend="simulated", device="onnxrt", options={"switch": str(switch)}, isolation="process", fallback="none",
        deadline=1.0, canary="off",
    )  # fmt: skip
    (guarded,) = open_guarded(open_bundle(folder), settings, ("onnxrt",))
    (link,) = guarded.links
    idle = link.encoder_if_open.program_for(Grid(1, 10, 6)).session
    pid = idle.pid
    switch.write_text('[{"all": true, "do": "hang"}]')
    (answer,) = guarded.encode_items(random_patches([(1, 6, 10)]), [Grid(1, 6, 10)])
    assert isinstance(answer, DeviceLostError)
    switch.write_text("")
    wait_until(lambda: link.restarts == 1)
    assert (idle.pid, idle.restarts) == (pid, 0)
    guarded.close()


def test_a_process_that_starts_too_slowly_is_a_failure_and_not_a_hang(tiny, tmp_path):
    guarded, _ = in_a_process(tiny, tmp_path)
    (link,) = guarded.links
    session = link.encoder_if_open.programs[0].session
    supervisor, opened = session._supervisor, threading.Event()

    start = supervisor._open

    def slow():
        opened.wait(20)
        return start()

    supervisor._open = slow
    os.kill(session.pid, signal.SIGKILL)
    wait_until(lambda: session.pid is None)
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert isinstance(answer, DeviceLostError)
    assert "has been starting for" in answer.message
    assert link.ready
    assert link.breaker.hangs_for == 0
    opened.set()
    wait_until(lambda: link.restarts == 1)
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert not isinstance(answer, VisionAccelError)
    guarded.close()


def test_a_call_that_its_session_ends_with_its_own_error_was_late(tiny):
    encoder = open_encoder(tiny, backend="torch_ref")
    (opened,) = encoder.programs
    ended = threading.Event()

    def run(inputs):
        assert ended.wait(20)
        raise DeviceError("the call was cancelled.")

    opened.session.run = run
    opened.session.end_calls = lambda: not ended.is_set() and (ended.set() or True)
    link = ChainLink("torch_ref", encoder, deadline=0.2)
    answer = link.encode(image(1), [GRID])
    assert isinstance(answer, DeviceLostError)
    assert answer.message.startswith("device 'cpu' did not answer within 0.2 s. Its call was ended.")
    assert link.ready
    link.close()


def test_a_call_that_does_not_end_returns_at_the_end_of_the_step_all_the_same(tiny):
    encoder = open_encoder(tiny, backend="torch_ref")
    (opened,) = encoder.programs
    held = threading.Event()
    opened.session.run = lambda inputs: held.wait(20)
    opened.session.end_calls = lambda: True
    link = ChainLink("torch_ref", encoder, deadline=0.3)
    started = time.monotonic()
    answer = link.encode(image(1), [GRID], until=started + 0.6)
    assert time.monotonic() - started < 0.6 + 1
    assert isinstance(answer, DeadlineError)
    held.set()
    link.close()


def test_a_canary_of_a_service_that_hangs_disables_the_device(tiny, tmp_path):
    switch = tmp_path / "switch.json"
    settings = Settings(
        backend="simulated", device="onnxrt", options={"switch": str(switch)}, fallback="torch_ref", deadline=0.5,
        canary_interval=0.05,
    )  # fmt: skip
    (guarded,) = open_guarded(open_tower(tiny), settings, settings.wanted_devices)
    switch.write_text('[{"all": true, "do": "hang", "seconds": 3}]')
    wait_until(lambda: not guarded.links[0].breaker.closed, 10)
    assert guarded.links[0].breaker.hangs_for
    switch.write_text("")
    wait_until(lambda: guarded.links[0].breaker.closed, 30)
    guarded.close()


def test_an_opening_that_hangs_ends_with_an_error_at_the_start(tiny, openings):
    scripts, _ = openings
    held = threading.Event()
    scripts["onnxrt"] = [lambda _: held.wait(30)]
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"did not open within 0\.5 s"):
        open_guarded(open_tower(tiny), Settings(backend="onnxrt", open_deadline=0.5), (None,))
    assert time.monotonic() - started < 10
    held.set()


def test_a_fallback_that_hangs_in_opening_is_disabled_and_used_once_it_is_open(tiny):
    held = threading.Event()

    def slow():
        held.wait(30)
        return open_encoder(tiny, backend="onnxrt")

    guarded, gate = gated(tiny)
    gate.fail = lambda patches: OSError("gone")
    chain = GuardedEncoder(guarded.links[0], [ChainLink("slow", slow, open_deadline=0.3, cool_down=0.05)])
    (answer,) = chain.encode_items(image(1), [GRID])
    assert isinstance(answer, DeviceError)
    assert "did not open within 0.3 s" in answer.message
    held.set()
    wait_until(lambda: chain.links[1].ready)
    (answer,) = chain.encode_items(image(1), [GRID])
    assert answer.fallback
    chain.close()


def test_a_backend_that_hangs_in_closing_does_not_hold_up_the_end(tiny, monkeypatch):
    monkeypatch.setattr("visionaccel.trust.link._GIVING_BACK", 0.2)
    guarded, gate = gated(tiny)
    held = threading.Event()
    gate.close = lambda: held.wait(30)
    started = time.monotonic()
    guarded.close()
    assert time.monotonic() - started < 10
    held.set()


def test_many_callers_of_one_slow_device_wait_for_their_turn_and_none_counts_as_late(tiny):
    guarded, gate = gated(tiny, deadline=2.0)
    slow = gate.run

    def run(inputs):
        time.sleep(0.7)
        return slow(inputs)

    gate.run = run
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(guarded.encode_items, image(seed), [GRID]) for seed in range(4)]
        answers = [each.result(30)[0] for each in asked]
    assert not any(isinstance(answer, VisionAccelError) for answer in answers)
    assert guarded.links[0].breaker.closed
    guarded.close()


def test_threads_that_hang_do_not_add_up(tiny):
    guarded, gate = gated(tiny, deadline=0.1)
    link = guarded.links[0]
    gate.shut()
    before = threading.active_count()
    for _ in range(5):
        assert isinstance(guarded.encode_items(image(1), [GRID])[0], DeviceError)
    time.sleep(1.0)  # several probes
    assert threading.active_count() - before <= 2, "the one that hangs, and the one that probes"
    assert not link.ready
    gate.let_in()
    wait_until(lambda: link.ready)
    guarded.close()


@hypothesis_settings(max_examples=15)
@given(
    schedule=st.lists(st.sampled_from(["right", "error", "hang"]), min_size=1, max_size=6),
    length=st.integers(1, 3),
    together=st.integers(1, 2),
)
def test_every_call_returns_within_its_deadline_or_its_link_is_disabled(tiny, schedule, length, together):
    limit, held, todo = 0.15, threading.Event(), list(schedule)
    links, hung = [], set()
    for number in range(length):
        encoder = open_encoder(tiny, backend="torch_ref")
        (opened,) = encoder.programs
        gate = Gate(opened.session)
        gate.fail = lambda _, number=number: _happen(todo.pop(0) if todo else "right", held, hung, number)
        session = [OpenProgram(opened.program, opened.host, gate)]
        device = Encoder(encoder.tower, str(number), session, default_registry())
        links.append(ChainLink(str(number), device, deadline=limit, cool_down=60.0))
    chain = GuardedEncoder(links[0], links[1:])
    grids = [GRID] * together
    while todo:
        started = time.monotonic()
        left = len(todo)
        answers = chain.encode_items(random_patches(grids), grids)
        # A retry and each item alone, on each link; what a busy machine adds to that.
        assert time.monotonic() - started < limit * together * length * 2 + 5
        assert len(answers) == together
        if left == len(todo):
            assert not any(link.ready or link.may_try for link in links)
            break
    assert len(hung) == schedule[: len(schedule) - len(todo)].count("hang"), "none is called while it hangs"
    assert all(links[number].breaker.hangs_for > 0 and not links[number].ready for number in hung)
    started = time.monotonic()
    chain.close()
    assert time.monotonic() - started < 8
    held.set()


def _happen(action, held, hung, number):
    if action == "hang":
        hung.add(number)
        held.wait(60)
    return OSError("gone") if action == "error" else None


@hypothesis_settings(max_examples=12)
@given(
    schedule=st.lists(st.sampled_from(["right", "error", "cut", "cut and hang"]), min_size=1, max_size=4),
    opens_late=st.booleans(),
    canary_on=st.booleans(),
)
def test_an_encode_that_outlasts_its_step_goes_on_and_its_deadline_holds(tiny, schedule, opens_late, canary_on):
    encoder, held, shut, inside, most = open_encoder(tiny, backend="torch_ref"), threading.Event(), set(), [], []
    (opened,) = encoder.programs
    gate, todo = Gate(opened.session), []

    def act(_):
        inside.append(True)
        most.append(len(inside))
        action = todo.pop(0) if todo else "right"
        if action.startswith("cut"):
            held.wait(60)
        inside.pop()
        return OSError("gone") if action == "error" else None

    gate.fail = act
    device = Encoder(encoder.tower, "device", [OpenProgram(opened.program, opened.host, gate)], default_registry())
    link = ChainLink(
        "device", (lambda: device) if opens_late else device, canary_on=canary_on, deadline=60.0, open_deadline=60.0,
        failures=9, cool_down=60.0,
    )  # fmt: skip
    for action in schedule:
        todo[:], begun, ready = [action], len(gate.calls), link.ready
        link.deadline = link.open_deadline = 0.5 if action == "cut and hang" else 60.0
        started = time.monotonic()
        until = started + 0.3 if action.startswith("cut") else None
        answer = link.encode(image(1), [Grid(*GRID)], until=until)
        assert time.monotonic() - started < 0.3 + 5 or until is None
        if not ready:
            assert isinstance(answer, DeviceError)
            assert len(gate.calls) == begun, "no call begins behind one that outlasted its step"
        elif action == "right":
            assert not isinstance(answer, VisionAccelError)
        elif action == "error":
            assert isinstance(answer, DeviceError)
        else:
            assert isinstance(answer, DeadlineError)
            assert not link.ready
            if action == "cut and hang":
                wait_until(lambda: link.breaker.hangs_for)
                shut.add(action)
        assert link.breaker.closed == (not shut)
    held.set()
    wait_until(lambda: not link.cut)
    assert link.ready == (not shut)
    assert max(most) == 1
    link.close()


# What failed once


def test_a_fallback_that_fails_to_open_once_answers_all_the_same(tiny, openings):
    scripts, opened = openings
    scripts["torch_ref"] = [DeviceError("out of memory.")]
    (guarded,) = open_guarded(open_tower(tiny), Settings(backend="onnxrt", fallback="torch_ref"), (None,))
    guarded.links[0].distrust("for the test")
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert answer.fallback
    assert opened.count("torch_ref") == 2
    guarded.close()


def test_a_fallback_that_fails_to_open_again_and_again_is_opened_in_the_background_later(tiny, openings):
    scripts, opened = openings
    scripts["torch_ref"] = [DeviceError("out of memory.")] * 4
    settings = Settings(backend="onnxrt", fallback="torch_ref", breaker_seconds=0.1)
    (guarded,) = open_guarded(open_tower(tiny), settings, (None,))
    primary, fallback = guarded.links
    primary._keeper.close(0)  # it stays disabled
    primary.distrust("for the test")
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert isinstance(answer, DeviceError)
    assert "torch_ref" in answer.message
    assert "out of memory" in answer.message
    wait_until(lambda: fallback.ready)
    assert opened.count("torch_ref") == 5
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert answer.fallback
    guarded.close()


def test_a_device_that_fails_to_open_at_the_start_is_not_tried_twice(tiny, openings):
    scripts, opened = openings
    scripts["onnxrt"] = [DeviceError("out of memory.")] * 2
    with pytest.raises(DeviceError, match="out of memory"):
        open_guarded(open_tower(tiny), Settings(backend="onnxrt"), (None,))
    assert opened == ["onnxrt"]


def test_a_configuration_that_is_wrong_is_not_tried_twice_by_one_request(tiny, openings):
    scripts, opened = openings
    scripts["torch_ref"] = [ConfigurationError("no such option.")] * 2
    settings = Settings(backend="onnxrt", fallback="torch_ref", breaker_seconds=60)
    (guarded,) = open_guarded(open_tower(tiny), settings, (None,))
    guarded.links[0].distrust("for the test")
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert isinstance(answer, DeviceError)
    assert opened.count("torch_ref") == 1
    guarded.close()


@pytest.mark.parametrize("step", [None, 20])
def test_a_call_whose_thread_cannot_start_fails_and_the_next_has_its_turn(tiny, monkeypatch, step):
    link = ChainLink("torch_ref", open_encoder(tiny, backend="torch_ref"))
    refused = refuse_once(monkeypatch, "visionaccel-call")
    answer = link.encode(image(1), [Grid(*GRID)], until=step and time.monotonic() + step)
    assert isinstance(answer, DeviceError)
    assert "can't start new thread" in answer.message
    assert len(refused) == 1
    assert not isinstance(link.encode(image(1), [Grid(*GRID)], until=time.monotonic() + 20), VisionAccelError)
    link.close()


def test_an_opening_whose_thread_cannot_start_is_an_error_and_is_tried_again(tiny, monkeypatch):
    link = ChainLink("torch_ref", lambda: open_encoder(tiny, backend="torch_ref"), cool_down=0.05)
    refuse_once(monkeypatch, "visionaccel-call")
    answer = link.encode(image(1), [Grid(*GRID)])
    assert isinstance(answer, DeviceError)
    assert "can't start new thread" in answer.message
    wait_until(lambda: link.ready)
    assert not isinstance(link.encode(image(1), [Grid(*GRID)]), VisionAccelError)
    link.close()


def test_a_probe_whose_thread_cannot_start_is_tried_again(tiny, monkeypatch, caplog):
    link = ChainLink("torch_ref", open_encoder(tiny, backend="torch_ref"), cool_down=0.05)
    refused = refuse_once(monkeypatch, "visionaccel-canary")
    link.distrust("for the test")
    wait_until(lambda: link.ready)
    assert len(refused) == 1
    assert "can't start new thread" in caplog.text
    link.close()


def test_a_disabled_link_is_probed_after_the_next_request_where_the_background_thread_could_not_start(
    tiny, monkeypatch
):
    jobs = Background()
    monkeypatch.setattr("visionaccel.trust.canary.background", jobs)
    monkeypatch.setattr("visionaccel.trust.chain.background", jobs)
    refused = refuse_once(monkeypatch, "visionaccel-background")
    link = ChainLink("torch_ref", open_encoder(tiny, backend="torch_ref"), cool_down=0.05)
    guarded = GuardedEncoder(link)
    link.distrust("for the test")
    assert len(refused) == 1
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert isinstance(answer, DeviceError)
    wait_until(lambda: link.ready)
    guarded.close()


# Which encoder answers


def test_a_fallback_that_opens_from_other_weights_is_found_before_it_answers(tiny, tmp_path_factory, openings):
    from visionaccel_testing.checkpoints import random_checkpoint

    other = open_tower(random_checkpoint(tmp_path_factory.mktemp("other"), seed=5))
    real = opening.open_encoder

    def replaced(source, *, backend, **kinds):
        return real(other if backend == "torch_ref" else source, backend=backend, **kinds)

    opening.open_encoder = replaced
    settings = Settings(backend="onnxrt", fallback="torch_ref, openvino", breaker_seconds=60)
    tower = open_tower(tiny)
    (guarded,) = open_guarded(tower, settings, (None,))
    guarded.links[0].distrust("for the test")
    (answer,) = guarded.encode_items(image(1), [GRID])
    np.testing.assert_allclose(answer.rows, reference(tiny, image(1), [GRID]), rtol=0, atol=2e-5)
    assert "the first encoder encoded at the start was encoded incorrectly" in guarded.links[1].breaker.reason
    guarded.close()


def test_the_reference_of_a_shadow_that_opens_from_other_weights_convicts_no_healthy_device(
    tiny, tmp_path_factory, openings, caplog
):
    from visionaccel_testing.checkpoints import random_checkpoint

    other = open_tower(random_checkpoint(tmp_path_factory.mktemp("other"), seed=5))
    real = opening.open_encoder

    def replaced(source, *, backend, **kinds):
        return real(other if backend == "torch_ref" else source, backend=backend, **kinds)

    opening.open_encoder = replaced
    (guarded,) = open_guarded(open_tower(tiny), Settings(backend="onnxrt", shadow=1.0), (None,))
    guarded.encode_items(image(1), [GRID])
    wait_until(lambda: "The reference could not encode" in caplog.text or guarded.shadow.compared)
    assert guarded.links[0].breaker.closed
    assert guarded.shadow.compared == 0
    guarded.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fallback_in_another_precision_passes_the_first_encoders_answer(tiny, dtype, openings):
    real = opening.open_encoder

    def chosen(source, *, backend, options=None, **kinds):
        options = {"dtype": dtype} if backend == "torch_ref" else options
        return real(source, backend=backend, options=options, **kinds)

    opening.open_encoder = chosen
    (guarded,) = open_guarded(open_tower(tiny), Settings(backend="onnxrt", fallback="torch_ref"), (None,))
    guarded.links[0].distrust("for the test")
    (answer,) = guarded.encode_items(image(1), [GRID])
    assert answer.fallback
    guarded.close()


# Races


def test_closing_an_encoder_twice_at_once_tells_both_the_truth(tiny):
    guarded, gate = gated(tiny)
    encoder = guarded.primary
    gate.shut()
    with ThreadPoolExecutor(3) as pool:
        call = pool.submit(encoder.encode, image(1), [GRID])
        gate.wait_for_calls(1)
        first = pool.submit(encoder.close)
        wait_until(lambda: encoder.closed)
        assert encoder.close(0.05) is False, "the first one still waits for the call"
        second = pool.submit(encoder.close)
        time.sleep(0.05)
        assert not second.done()
        gate.let_in()
        assert first.result(20)
        assert second.result(20)
        assert call.result(20).shape == (4, 24)
    assert gate.closed
    assert encoder.close() is True


class Slow(int):
    """A number that another thread can overtake while one is added to it."""

    def __add__(self, other):
        time.sleep(0.002)
        return Slow(int(self) + other)


def test_counters_of_a_chain_count_every_thread(tiny):
    guarded, gate = gated(tiny, fallback=lambda: open_encoder(tiny, backend="onnxrt"))
    gate.fail = lambda patches: OSError("gone")
    guarded.encode_items(image(0), [GRID])
    guarded.fallback_items, guarded.failed_items = Slow(0), Slow(0)
    with ThreadPoolExecutor(4) as pool:
        for asked in [pool.submit(guarded.encode_items, image(seed), [GRID]) for seed in range(20)]:
            asked.result(30)
        for asked in [pool.submit(guarded.encode_items, image(0), [(1, 3, 3)]) for _ in range(20)]:
            asked.result(30)
    assert (guarded.fallback_items, guarded.failed_items) == (20, 20)
    guarded.close()


def test_a_late_call_counts_for_nothing_once_its_item_was_taken_back(tiny):
    guarded, gate = gated(tiny, fallback=lambda: open_encoder(tiny, backend="onnxrt"), deadline=0.5)
    gate.shut()
    with EncodeService([guarded]) as service:
        service.submit(image(0), GRID).result(20)
        gate.let_in()
        wait_until(lambda: gate.inside == 0 and guarded.links[0].ready)
        wait_until(lambda: service.counters.running == 0)
        time.sleep(0.05)
        counters = service.counters
        assert (counters.submitted, counters.encoded, counters.fallback) == (1, 1, 1)
        assert service.room


def test_devices_of_two_models_do_not_share_embeddings_and_two_of_one_model_do(tiny):
    def with_device(device, hardware):
        guarded, gate = gated(tiny)
        gate.capabilities = replace(gate.capabilities, device=device, hardware=hardware)
        return guarded

    EncodeService([with_device("cuda:0", "H200"), with_device("cuda:1", "H200")]).close()
    with pytest.raises(ConfigurationError, match="must run the same"):
        EncodeService([with_device("cuda:0", "H200"), with_device("cuda:1", "T4")])


def test_two_threads_get_one_registry_and_one_observer(monkeypatch):
    from visionaccel.backends import registry
    from visionaccel.observe import observers

    class Observer:
        def __init__(self):
            time.sleep(0.05)

    made = []

    def slow_registry():
        time.sleep(0.05)
        made.append(registry.Registry())
        return made[-1]

    monkeypatch.setattr(registry, "_default", cache(slow_registry))
    with ThreadPoolExecutor(4) as pool:
        found = {id(each.result()) for each in [pool.submit(default_registry) for _ in range(4)]}
    assert len(found) == len(made) == 1
    with ThreadPoolExecutor(4) as pool:
        each = [pool.submit(observers.installed, Observer, Observer) for _ in range(4)]
        assert len({id(one.result()) for one in each}) == 1
    default_registry().plugins.unregister(each[0].result())


def test_settings_open_a_service_whose_devices_have_the_deadline(tiny):
    with open_service(tiny, backend="onnxrt", fallback="torch_ref", deadline=7.0) as service:
        assert {link.deadline for encoder in service.encoders for link in encoder.links} == {7.0}
