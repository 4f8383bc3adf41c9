"""Chains of encoders: no item is lost while a healthy encoder remains, and a disabled encoder is not used."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gated import Gate, gated, wait_until
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.backends import Registry, default_registry, hookimpl
from visionaccel.core.grid import Grid
from visionaccel.encoder import Encoder, OpenProgram, open_tower
from visionaccel.errors import (
    DeadlineError,
    DeviceError,
    OutputError,
    UnfitGridError,
    UnknownBackendError,
    VisionAccelError,
)
from visionaccel.service import EmbeddingCache, EncodeService, open_guarded, open_service
from visionaccel.settings import Settings
from visionaccel.trust import BreakerState, ChainLink, GuardedEncoder, Shadow

GRID = (1, 4, 4)


class Scripted(Gate):
    """A session that does what the test says, call by call: an error, a spoilt answer, or a right one."""

    restarts = 0

    def __init__(self, session):
        super().__init__(session)
        self.script = []

    def run(self, inputs):
        outputs = {name: np.array(rows) for name, rows in super().run(inputs).items()}
        action = self.script.pop(0) if self.script else "right"
        if isinstance(action, Exception):
            raise action
        if action == "nan":
            outputs["embeddings"][0] = np.nan
        elif action == "drift":
            outputs["embeddings"][:, ::2] *= -1
        return outputs


def scripted(checkpoint, name, **settings):
    """A link on a scripted session, and the session."""
    encoder = open_encoder(checkpoint, backend="torch_ref")
    (opened,) = encoder.programs
    session = Scripted(opened.session)
    programs = [OpenProgram(opened.program, opened.host, session)]
    return ChainLink(name, Encoder(encoder.tower, name, programs, default_registry()), **settings), session


def failures(told):
    return [(report.backend, report.kind, report.following) for report in told.failed]


def right(checkpoint, patches, grids):
    return reference(checkpoint, patches, grids)


# What is tried, and in what order


def test_a_wrong_output_is_tried_once_more_and_then_goes_down_the_chain(tiny, told):
    first, device = scripted(tiny, "first")
    second, other = scripted(tiny, "second")
    guarded = GuardedEncoder(first, [second])
    patches = random_patches([GRID])
    device.script = ["nan"]
    (answer,) = guarded.encode_items(patches, [GRID])
    assert (answer.fallback, len(device.calls), len(other.calls)) == (False, 2, 0)
    device.script = ["nan", "nan"]
    (answer,) = guarded.encode_items(patches, [GRID])
    assert (answer.fallback, len(device.calls), len(other.calls)) == (True, 4, 1)
    np.testing.assert_allclose(answer.rows, right(tiny, patches, [GRID]), rtol=0, atol=2e-5)
    assert failures(told) == [("first", "OutputError", "second")] * 3
    guarded.close()


def test_of_several_items_encoding_each_alone_is_the_second_try(tiny):
    first, device = scripted(tiny, "first")
    second, other = scripted(tiny, "second")
    guarded = GuardedEncoder(first, [second])
    grids = [GRID, (1, 4, 6)]
    device.script = ["nan", "right", "nan"]
    answers = guarded.encode_items(random_patches(grids), grids)
    assert [answer.fallback for answer in answers] == [False, True]
    assert (len(device.calls), len(other.calls)) == (3, 1)
    guarded.close()


def test_where_nothing_follows_any_failure_is_tried_once_more(tiny, told):
    first, device = scripted(tiny, "first")
    guarded = GuardedEncoder(first)
    device.script = [OSError("the device went away")]
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert not isinstance(answer, VisionAccelError)
    device.script = [OSError("the device went away")] * 2
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert isinstance(answer, DeviceError)
    assert len(device.calls) == 4
    assert failures(told)[0] == ("first", "DeviceError", "retry")
    guarded.close()


def test_a_chain_is_asked_in_its_order_and_every_reason_is_told(tiny):
    links, devices = zip(*(scripted(tiny, name) for name in ("first", "second", "third")), strict=True)
    guarded = GuardedEncoder(links[0], links[1:])
    for device in devices:
        device.script = [OSError(f"device {id(device)} is gone")] * 3
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert isinstance(answer, DeviceError)
    assert all(str(id(device)) in answer.message for device in devices)
    devices[2].script = []
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert answer.fallback
    assert guarded.fallback_items == 1
    guarded.close()


def test_a_grid_that_fits_nothing_is_no_failure_of_the_device(tiny, told):
    first, device = scripted(tiny, "first", failures=1)
    encoder = first.encoder_if_open

    def unfit(grid):
        raise UnfitGridError("no program takes it.")

    encoder.program_for = unfit
    second, _ = scripted(tiny, "second")
    guarded = GuardedEncoder(first, [second])
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert answer.fallback
    assert first.breaker.closed
    assert told.failed == []
    assert device.calls == []
    guarded.close()


# Out of work


def test_what_fails_in_a_row_is_out_of_work_until_a_probe_passes(tiny, caplog):
    first, device = scripted(tiny, "first", failures=3, cool_down=30.0)
    second, other = scripted(tiny, "second")
    guarded = GuardedEncoder(first, [second])
    patches = random_patches([GRID])
    device.script = [OSError("gone")] * 3
    for _ in range(5):
        (answer,) = guarded.encode_items(patches, [GRID])
        assert answer.fallback
    assert first.breaker.state is BreakerState.OPEN
    assert (len(device.calls), len(other.calls)) == (3, 5), "it is not asked any more"
    assert "Encoder 'first' is disabled: 3 encodes in a row failed" in caplog.text
    guarded.close()


def test_where_nothing_else_is_healthy_what_only_failed_often_is_asked_all_the_same(tiny):
    first, device = scripted(tiny, "first", failures=1, cool_down=30.0)
    guarded = GuardedEncoder(first)
    device.script = [OSError("gone")] * 2
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert isinstance(answer, DeviceError)
    assert not first.breaker.closed
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert not isinstance(answer, VisionAccelError)
    guarded.close()


def test_what_answers_wrongly_is_never_asked_and_the_reason_is_told(tiny):
    first, device = scripted(tiny, "first", cool_down=30.0)
    guarded = GuardedEncoder(first)
    first.distrust("the reference does not agree")
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert isinstance(answer, DeviceError)
    assert "first is disabled (open): the reference does not agree" in answer.message
    assert device.calls == []
    guarded.close()


def test_another_device_of_the_same_kind_takes_over_and_its_answers_are_no_fallbacks(tiny):
    first, device = scripted(tiny, "first", same=True)
    sibling, other = scripted(tiny, "sibling", same=True)
    guarded = GuardedEncoder(first, [sibling])
    device.script = [OSError("gone")]
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert not answer.fallback
    assert guarded.fallback_items == 0
    assert len(other.calls) == 1
    guarded.close()


def test_devices_of_one_service_take_over_from_each_other(tiny, tmp_path):
    switch = tmp_path / "switch.json"
    service = open_service(
        tiny, backend="simulated", devices=["onnxrt@0", "onnxrt@1"], options={"switch": str(switch)}, cache_size=0
    )
    with service:
        one, other = (encoder.links[0] for encoder in service.encoders)
        one.distrust("for the test")
        for seed in range(6):
            patches = random_patches([GRID], seed=seed)
            (rows,) = service.encode(patches, [GRID])
            np.testing.assert_allclose(rows, right(tiny, patches, [GRID]), rtol=0, atol=2e-5)
        assert service.counters.fallback == 0
        assert {link.name for link in service.encoders[0].links} == {"simulated"}
        assert service.encoders[0].links[1] is other


# Hangs


def test_a_hang_in_the_servers_process_leaves_the_item_and_those_behind_it_to_the_fallback(tiny):
    links = []

    def fallback():
        links.append(threading.get_ident())
        return open_encoder(tiny, backend="onnxrt")

    guarded, gate = gated(tiny, fallback, deadline=0.5)
    gate.shut()
    with EncodeService([guarded]) as service:
        futures = [service.submit(random_patches([GRID], seed=seed), GRID) for seed in range(4)]
        for seed, future in enumerate(futures):
            exact = right(tiny, random_patches([GRID], seed=seed), [GRID])
            np.testing.assert_allclose(future.result(30), exact, rtol=0, atol=2e-5)
        assert (service.counters.failed, service.counters.fallback) == (0, 4)
        assert not guarded.links[0].breaker.closed
        gate.let_in()
        wait_until(lambda: guarded.links[0].breaker.closed)
        before = service.counters.fallback
        service.submit(random_patches([GRID], seed=9), GRID).result(30)
        assert service.counters.fallback == before, "the device is enabled again"
        wait_until(lambda: service.counters.running == 0)


def test_a_fallback_that_hangs_too_is_left_as_well_and_the_item_fails(tiny):
    encoder = open_encoder(tiny, backend="torch_ref")
    (opened,) = encoder.programs
    stuck = Gate(opened.session)
    stuck.shut()
    second = Encoder(encoder.tower, "stuck", [OpenProgram(opened.program, opened.host, stuck)], default_registry())
    guarded, gate = gated(tiny, lambda: second, deadline=0.3)
    gate.shut()
    with EncodeService([guarded]) as service:
        future = service.submit(random_patches([GRID]), GRID)
        with pytest.raises(DeviceError):
            future.result(30)
        gate.let_in()
        stuck.let_in()


def test_in_line_a_hang_ends_after_the_deadline_and_the_fallback_answers(tiny, tmp_path):
    switch = tmp_path / "switch.json"
    settings = Settings(
        backend="simulated",
        device="onnxrt",
        options={"switch": str(switch)},
        fallback="torch_ref",
        deadline=0.5,
        breaker_seconds=0.05,
    )
    (guarded,) = open_guarded(open_tower(tiny), settings, ("onnxrt",))
    patches = random_patches([GRID])
    switch.write_text('[{"all": true, "do": "hang", "seconds": 1.5}]')
    started = time.monotonic()
    (answer,) = guarded.encode_items(patches, [GRID])
    assert 0.5 <= time.monotonic() - started < 1.5 + 5
    assert answer.fallback
    switch.write_text("")
    wait_until(lambda: guarded.links[0].breaker.closed)
    (answer,) = guarded.encode_items(patches, [GRID])
    assert not answer.fallback
    guarded.close()


# The end of the engine's step


def test_a_call_that_the_steps_end_cuts_off_is_no_hang_and_its_device_works_again_once_it_returns(tiny, told):
    guarded, gate = gated(tiny, deadline=60.0)
    (link,) = guarded.links
    gate.shut()
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID], until=time.monotonic() + 0.5)
    assert isinstance(answer, DeadlineError)
    assert "the engine's step ran out of time before device 'cpu' answered" in answer.message
    assert "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS" in answer.hint
    assert link.breaker.closed
    assert not link.breaker.hangs_for

    # Nothing else is given to it until then, not even what has all the time.
    assert not link.ready
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    assert "gated is still busy with an encode that did not end within its engine's step" in answer.message
    assert isinstance(link.encode(random_patches([GRID]), [Grid(*GRID)]), DeadlineError)
    assert (len(gate.calls), link.breaker.closed) == (1, True)

    gate.let_in()
    wait_until(lambda: link.ready)
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID])
    np.testing.assert_allclose(answer.rows, right(tiny, random_patches([GRID]), [GRID]), rtol=0, atol=2e-5)
    assert told.breakers == []
    guarded.close()


def test_a_call_that_the_steps_end_cut_off_is_a_hang_once_its_own_deadline_has_passed(tiny):
    guarded, gate = gated(tiny, deadline=1.0)
    (link,) = guarded.links
    gate.shut()
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID], until=time.monotonic() + 0.3)
    assert isinstance(answer, DeadlineError)
    assert link.breaker.closed
    wait_until(lambda: link.breaker.hangs_for)
    assert "device 'cpu' did not answer within 1 s" in link.breaker.reason
    gate.let_in()
    wait_until(lambda: link.ready)
    guarded.close()


def test_a_call_that_the_steps_end_cut_off_counts_as_failed_if_it_fails(tiny):
    link, device = scripted(tiny, "first", failures=1, cool_down=60)
    device.shut()
    device.script = [OSError("gone")]
    answer = link.encode(random_patches([GRID]), [Grid(*GRID)], until=time.monotonic() + 0.3)
    assert isinstance(answer, DeadlineError)
    assert link.breaker.closed
    device.let_in()
    wait_until(lambda: not link.breaker.closed)
    assert "gone" in link.breaker.reason
    link.close()


def test_a_canary_that_the_steps_end_cuts_off_goes_on_and_is_not_repeated(tiny):
    link, device = scripted(tiny, "first", canary_on=True, failures=1, cool_down=60)
    device.shut()
    answer = link.encode(random_patches([GRID]), [Grid(*GRID)], until=time.monotonic() + 0.3)
    assert isinstance(answer, DeadlineError)
    assert "the first canary of first is still running" in answer.message
    assert link.breaker.closed
    device.let_in()
    wait_until(lambda: link.ready)
    assert len(device.calls) == 1, "the encode of that step does not begin after it"
    assert len(link.encode(random_patches([GRID]), [Grid(*GRID)])) == 4
    assert len(device.calls) == 2
    link.close()


def test_an_encode_that_waits_for_another_does_not_begin_after_its_step(tiny):
    link, device = scripted(tiny, "first", deadline=60.0)
    device.shut()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(link.encode, random_patches([GRID]), [Grid(*GRID)])
        device.wait_for_calls(1)
        answer = link.encode(random_patches([GRID]), [Grid(*GRID)], until=time.monotonic() + 0.3)
        assert isinstance(answer, DeadlineError)
        device.let_in()
        assert len(other.result(20)) == 4
    wait_until(lambda: link.ready)
    assert len(device.calls) == 1
    link.close()


def test_an_encode_that_the_steps_end_cut_off_does_not_hold_up_closing(tiny):
    link, device = scripted(tiny, "first", deadline=60.0)
    device.shut()
    assert isinstance(link.encode(random_patches([GRID]), [Grid(*GRID)], until=time.monotonic() + 0.3), DeadlineError)
    started = time.monotonic()
    link.close()
    assert time.monotonic() - started < 5
    device.let_in()
    wait_until(lambda: device.closed)
    wait_until(lambda: not link.cut)
    answer = link.encode(random_patches([GRID]), [Grid(*GRID)], until=time.monotonic() + 20)
    assert "first is closed" in answer.message


def test_no_call_begins_at_the_very_end_of_a_step(tiny):
    guarded, gate = gated(tiny)
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID], until=time.monotonic() + 0.05)
    assert "the engine's step has no time left for this image" in answer.message
    assert gate.calls == []
    assert guarded.links[0].ready
    guarded.close()


def test_a_process_that_computes_when_the_step_ends_is_not_ended(tiny, tmp_path):
    switch = tmp_path / "switch.json"
    settings = Settings(
        backend="simulated", device="onnxrt", options={"switch": str(switch)}, isolation="process", fallback="none",
        deadline=60.0, canary="off",
    )  # fmt: skip
    (guarded,) = open_guarded(open_tower(tiny), settings, ("onnxrt",))
    (link,) = guarded.links
    switch.write_text('[{"all": true, "do": "hang", "seconds": 2}]')
    (answer,) = guarded.encode_items(random_patches([GRID]), [GRID], until=time.monotonic() + 0.5)
    assert isinstance(answer, DeadlineError)
    switch.write_text("")
    wait_until(lambda: link.ready)
    assert (link.restarts, link.breaker.closed) == (0, True)
    guarded.close()


def test_a_fallback_that_the_steps_end_leaves_opening_is_used_once_it_is_open(tiny):
    held = threading.Event()

    def slow():
        held.wait(30)
        return open_encoder(tiny, backend="torch_ref")

    link = ChainLink("slow", slow)
    answer = link.encode(random_patches([GRID]), [Grid(*GRID)], until=time.monotonic() + 0.3)
    assert "slow is still being opened" in answer.message
    assert link.breaker.closed
    assert not link.ready
    held.set()
    wait_until(lambda: link.ready)
    assert len(link.encode(random_patches([GRID]), [Grid(*GRID)])) == 4
    link.close()


# The shadow


def test_a_shadow_that_agrees_only_counts(tiny, told):
    first, _ = scripted(tiny, "first")
    with open_encoder(tiny, backend="onnxrt") as exact:
        shadow = Shadow(1.0, 0.9999, ChainLink("exact", exact))
        guarded = GuardedEncoder(first, (), shadow)
        grids = [GRID, (1, 4, 6)]
        guarded.encode_items(random_patches(grids), grids)
        wait_until(lambda: shadow.compared == 2)
        assert [(report.source, report.passed) for report in told.compared] == [("shadow", True)] * 2
        assert first.breaker.closed
        guarded.close()


def test_a_shadow_that_disagrees_takes_the_device_out_of_work_and_forgets_what_it_answered(tiny):
    first, device = scripted(tiny, "first", cool_down=0.05)
    second, _ = scripted(tiny, "second")
    with open_encoder(tiny, backend="onnxrt") as exact:
        shadow = Shadow(1.0, 0.9999, ChainLink("exact", exact))
        with EncodeService([GuardedEncoder(first, [second], shadow)]) as service:
            patches = random_patches([GRID])
            device.script = ["drift"] * 100
            wrong = service.submit(patches, GRID).result(30)
            wait_until(lambda: not first.breaker.closed)
            wait_until(lambda: service.cache.held == 0)
            time.sleep(0.5)
            assert not first.breaker.closed, "it must get that image right before it is enabled again"
            rows = service.submit(patches, GRID).result(30)
            np.testing.assert_allclose(rows, right(tiny, patches, [GRID]), rtol=0, atol=2e-5)
            assert np.abs(wrong - rows).max() > 0.1
            assert (service.counters.fallback, service.counters.cached) == (1, 0)
            device.script = []
            wait_until(lambda: first.breaker.closed)


class Exits:
    """An observer that calls `sys.exit` whatever it is told."""

    @hookimpl
    def visionaccel_failed(self, report):
        raise SystemExit(f"on {type(report).__name__}")

    visionaccel_compared = visionaccel_breaker = visionaccel_failed


@pytest.fixture
def exits():
    plugins, observer = default_registry().plugins, Exits()
    plugins.register(observer)
    yield
    plugins.unregister(observer)


def test_an_observer_that_exits_costs_no_encode_and_hides_no_wrong_answer(tiny, exits, caplog):
    first, device = scripted(tiny, "first", failures=1, cool_down=60)
    second, _ = scripted(tiny, "second")
    device.script = [OSError("gone")]
    chain = GuardedEncoder(first, [second])
    (answer,) = chain.encode_items(random_patches([GRID]), [GRID])
    assert answer.fallback
    wait_until(lambda: all(f"SystemExit: on {name}" in caplog.text for name in ("FailureReport", "BreakerReport")))
    chain.close()

    liar, device = scripted(tiny, "liar", cool_down=60)
    device.script = ["drift"]
    chain = GuardedEncoder(liar, [], Shadow(1.0, 0.9999, scripted(tiny, "reference")[0]))
    chain.encode_items(random_patches([GRID]), [GRID])
    wait_until(lambda: not liar.breaker.closed)
    assert "SystemExit: on DriftReport" in caplog.text
    chain.close()


class Hangs:
    """An observer of breakers that hangs until it is let go."""

    def __init__(self):
        self.states, self.go_on = [], threading.Event()

    @hookimpl
    def visionaccel_breaker(self, report):
        self.go_on.wait(30)
        self.states.append(report.state)


def test_an_observer_of_breakers_that_hangs_holds_up_no_change_and_is_told_in_order(tiny):
    plugins, observer = default_registry().plugins, Hangs()
    plugins.register(observer)
    link, device = scripted(tiny, "first", failures=1, cool_down=0.05)
    device.script = [OSError("gone")]
    started = time.monotonic()
    assert isinstance(link.encode(random_patches([GRID]), [Grid(*GRID)]), DeviceError)
    wait_until(lambda: link.ready)
    assert time.monotonic() - started < 20
    assert len(link.encode(random_patches([GRID]), [Grid(*GRID)])) == 4
    assert observer.states == []
    observer.go_on.set()
    wait_until(lambda: observer.states == ["open", "half-open", "closed"])
    plugins.unregister(observer)
    link.close()


def test_a_shadow_looks_at_its_share_and_skips_what_it_has_no_time_for(tiny):
    first, _ = scripted(tiny, "first")
    entered = threading.Event()

    def busy():
        entered.wait(20)
        raise DeviceError("the reference is gone.")

    none, some, busy_one = (
        Shadow(0.0, 0.99, ChainLink("busy", busy)),
        Shadow(0.3, 0.99, ChainLink("busy", busy)),
        Shadow(1.0, 0.99, ChainLink("busy", busy)),
    )
    random.seed(1)
    patches = random_patches([GRID])
    for _ in range(200):
        none.offer(first, patches, GRID, patches)
        some.offer(first, patches, GRID, patches)
    for _ in range(10):
        busy_one.offer(first, patches, GRID, patches)
    assert len(none._comparisons) + none.skipped == 0
    assert 40 <= len(some._comparisons) + some.skipped <= 80
    assert busy_one.skipped >= 10 - 3
    for shadow in (none, some, busy_one):
        shadow.close()
    entered.set()
    assert first.breaker.closed, "a reference that fails says nothing of the device"
    first.close()


def test_a_shadow_compares_with_no_reference_that_is_disabled(tiny):
    first, _ = scripted(tiny, "first")
    link, device = scripted(tiny, "reference", cool_down=60.0)
    shadow, patches = Shadow(1.0, 0.99, link), random_patches([GRID])
    link.distrust("for the test")
    shadow.offer(first, patches, Grid(*GRID), np.zeros((4, 24), np.float32))
    wait_until(lambda: shadow.skipped == 1)
    assert (device.calls, shadow.compared) == ([], 0)
    assert first.breaker.closed
    shadow.close()
    first.close()


def test_closing_a_shadow_drops_what_waits_and_takes_no_more(tiny, caplog):
    first, _ = scripted(tiny, "first")
    link, gate = scripted(tiny, "reference")
    gate.shut()
    shadow, patches = Shadow(1.0, 0.99, link), random_patches([GRID])
    for _ in range(3):
        shadow.offer(first, patches, Grid(*GRID), patches)
    gate.wait_for_calls(1)
    shadow.close()
    shadow.offer(first, patches, Grid(*GRID), patches)
    gate.let_in()
    wait_until(lambda: gate.closed)
    wait_until(lambda: not any(thread.name == "visionaccel-shadow" for thread in threading.enumerate()))
    assert (len(gate.calls), shadow.drifted, len(shadow._comparisons)) == (1, 0, 0)
    assert first.breaker.closed
    assert "A call of encoder 'reference' has not returned" in caplog.text, "it was let in after the close"
    assert "could not encode" not in caplog.text, "what was being compared is dropped too"
    first.close()


# The settings


def test_settings_make_the_chain_the_breaker_and_the_shadow(tiny):
    settings = Settings(backend="onnxrt", fallback="openvino, torch_ref", shadow=0.5, breaker_failures=2)
    guarded = open_guarded(open_tower(tiny), settings, (None, None))
    assert [[link.name for link in each.links] for each in guarded] == [
        ["onnxrt", "onnxrt", "openvino", "torch_ref"]
    ] * 2
    assert guarded[0].links[2:] == guarded[1].links[2:], "fallbacks are shared"
    assert all(each.shadow is not None for each in guarded)
    assert guarded[0].shadow is not guarded[1].shadow, "one does not hold up the other"
    for each in guarded:
        each.close()


def test_a_chain_starts_with_the_first_fallback_that_can(tiny, caplog):
    settings = Settings(backend="flexmlrt", fallback="flexmlrt,onnxrt,torch_ref")
    (guarded,) = open_guarded(open_tower(tiny), settings, (None,))
    assert guarded.primary.backend == "onnxrt"
    assert [link.name for link in guarded.links] == ["onnxrt", "torch_ref"]
    guarded.close()


def test_the_errors_of_attempts_keep_their_types(tiny):
    first, device = scripted(tiny, "first", deadline=0.2)
    device.script = ["nan"]
    assert isinstance(first.encode(random_patches([GRID]), [Grid(*GRID)]), OutputError)
    device.shut()
    assert isinstance(first.encode(random_patches([GRID]), [Grid(*GRID)]), DeadlineError)
    device.let_in()
    first.close()


# Races


def test_an_answer_that_was_under_way_when_its_device_was_found_to_lie_is_not_used(tiny):
    first, device = scripted(tiny, "first")
    second, _ = scripted(tiny, "second")
    patches = random_patches([GRID])
    with EncodeService([GuardedEncoder(first, [second])]) as service:
        device.script = ["drift"]
        device.shut()
        future = service.submit(patches, GRID)
        device.wait_for_calls(1)
        first.distrust("its canary failed")
        device.let_in()
        np.testing.assert_allclose(future.result(30), right(tiny, patches, [GRID]), rtol=0, atol=2e-5)
        assert service.counters.fallback == 1
        assert service.cache.held == 0, "nor kept"


def test_what_was_forgotten_while_it_was_computed_is_not_kept():

    cache, rows = EmbeddingCache(10_000), np.ones((4, 24), np.float32)
    before = cache.generation
    cache.clear()
    cache.put("late", rows, before)
    assert cache.get("late") is None
    cache.put("late", rows, cache.generation)
    assert cache.get("late") is not None


def test_a_canary_that_hangs_holds_up_no_request_and_no_closing(tiny, monkeypatch):
    monkeypatch.setattr("visionaccel.trust.link._CLOSING", 0.1)
    first, device = scripted(tiny, "first", canary_on=True, interval=0.05, deadline=0.3)
    second, _ = scripted(tiny, "second")
    guarded = GuardedEncoder(first, [second])
    patches = random_patches([GRID])
    (answer,) = guarded.encode_items(patches, [GRID])
    assert not answer.fallback
    device.shut()
    device.wait_for_calls(len(device.calls) + 1)  # the canary's
    started = time.monotonic()
    (answer,) = guarded.encode_items(patches, [GRID])
    assert answer.fallback
    assert time.monotonic() - started < 10
    assert not first.breaker.closed
    device.let_in()
    wait_until(lambda: first.breaker.closed)
    guarded.close()


def test_a_canary_that_cannot_be_encoded_is_a_failure_and_not_a_lie(tiny):
    first, device = scripted(tiny, "first", canary_on=True, failures=2)
    forgotten = []
    first.on_drift(lambda: forgotten.append(True))
    device.script = [OSError("gone"), "right", OSError("gone")]
    assert "a test picture could not be encoded" in first.check().failure
    assert first.check().failure is None
    result = first.check()
    assert result.failure is not None
    assert not result.wrong
    assert first.breaker.closed
    assert forgotten == []
    device.script = ["drift"]
    assert first.check().wrong
    assert first.breaker.proven
    assert forgotten == [True]
    first.close()


@pytest.mark.parametrize("hung_before", [False, True])
def test_a_device_that_keeps_lying_is_forgotten_once(tiny, hung_before):
    first, device = scripted(tiny, "first", canary_on=True, cool_down=0.01)
    forgotten = []
    first.on_drift(lambda: forgotten.append(True))
    assert first.check().failure is None
    device.script = ["drift"] * 100
    if hung_before:
        first.breaker.trip("it hung", hangs=True)
    else:
        assert first.check().wrong
    wait_until(lambda: len(device.calls) >= 6)
    assert forgotten == [True]
    assert not first.breaker.closed
    device.script = []
    wait_until(lambda: first.breaker.closed)
    device.script = ["drift"]
    assert first.check().wrong
    assert forgotten == [True, True], "it was used in between"
    first.close()


def test_a_device_that_was_enabled_for_a_moment_between_two_lies_is_forgotten_again(tiny):
    first, device = scripted(tiny, "first", canary_on=True, cool_down=0.05)
    forgotten, go_on = [], threading.Event()

    class LateReport:
        """Holds up the report that the link is enabled."""

        def __enter__(self):
            assert not first.breaker.closed or go_on.wait(20)

        def __exit__(self, *_):
            pass

    first._telling = LateReport()
    first.on_drift(lambda: forgotten.append(True))
    first.distrust("for the test")
    wait_until(lambda: first.breaker.closed)
    device.script = ["drift"] * 100
    first.breaker.trip("it hung", hangs=True)
    go_on.set()
    wait_until(lambda: len(forgotten) == 2)
    first.close()


def test_an_answer_of_a_process_that_restarted_after_its_canary_is_dropped(tiny):
    first, device = scripted(tiny, "first", canary_on=True)
    right_run = device.run

    def run(inputs):
        device.restarts = 1  # as if it ended with the first canary
        return right_run(inputs)

    device.run = run
    assert len(first.encode(random_patches([GRID]), [Grid(*GRID)])) == 4
    assert len(device.calls) == 4, "a canary and an encode for each process"
    first.close()


@pytest.mark.parametrize("answer", [None, {"embeddings": None}, 7])
def test_a_session_that_breaks_its_contract_is_a_failed_device_and_comes_back(tiny, answer):
    first, device = scripted(tiny, "first", canary_on=True, failures=1, cool_down=0.01)
    second, _ = scripted(tiny, "second")
    guarded = GuardedEncoder(first, [second])
    right_run, patches = device.run, random_patches([GRID])
    device.run = lambda inputs: answer
    (found,) = guarded.encode_items(patches, [GRID])
    assert found.fallback
    assert first.check().failure is not None
    device.run = right_run
    wait_until(lambda: first.breaker.closed)
    (found,) = guarded.encode_items(patches, [GRID])
    assert not found.fallback
    guarded.close()


def test_in_line_the_deadline_is_of_each_image(tiny):
    first, device = scripted(tiny, "first", deadline=0.4)
    slow = device.run

    def run(inputs):
        time.sleep(0.1 * len(inputs["pixel_values"]) / 16)
        return slow(inputs)

    device.run = run
    guarded = GuardedEncoder(first)
    answers = guarded.encode_items(random_patches([GRID] * 8), [GRID] * 8)
    assert not any(isinstance(answer, VisionAccelError) for answer in answers)
    assert first.breaker.closed
    guarded.close()


def test_a_service_of_two_devices_closes_although_one_hangs(tiny):
    one, other = gated(tiny, deadline=60.0)[0], gated(tiny, deadline=60.0)[0]
    links = one.links[0], other.links[0]
    hung, well = (link.encoder_if_open.programs[0].session for link in links)
    service = EncodeService([GuardedEncoder(links[0], [links[1]]), GuardedEncoder(links[1], [links[0]])])
    hung.shut()
    well.shut()
    futures = [service.submit(random_patches([GRID], seed=seed), GRID) for seed in range(2)]
    hung.wait_for_calls(1)
    well.wait_for_calls(1)
    well.let_in()
    started = time.monotonic()
    service.close(wait=0.5)
    assert time.monotonic() - started < 8
    assert all(future.done() for future in futures)
    assert (well.closed, hung.closed) == (True, False)
    hung.let_in()
    wait_until(lambda: hung.closed)


def test_a_hang_without_a_fallback_is_told_and_counted(tiny, told):
    guarded, gate = gated(tiny, deadline=0.3)
    gate.shut()
    with EncodeService([guarded]) as service:
        with pytest.raises(DeadlineError):
            service.submit(random_patches([GRID]), GRID).result(20)
        assert [(report.kind, report.following) for report in told.failed] == [("DeadlineError", None)]
        assert service.counters.failed == 1
        gate.let_in()


def test_closing_closes_every_encoder_although_one_raises(tiny):
    first, device = scripted(tiny, "first")
    second, other = scripted(tiny, "second")

    def close():
        raise OSError("gone")

    device.close = close
    with pytest.raises(OSError, match="gone"):
        GuardedEncoder(first, [second]).close()
    assert other.closed


def test_closing_closes_the_reference_of_a_shadow_and_opens_nothing_any_more(tiny):
    settings = Settings(backend="onnxrt", shadow=1.0)
    (guarded,) = open_guarded(open_tower(tiny), settings, (None,))
    guarded.encode_items(random_patches([GRID]), [GRID])
    wait_until(lambda: guarded.shadow.compared == 1)
    reference_link = guarded.shadow._reference
    guarded.close()
    assert reference_link.encoder_if_open.closed
    late = ChainLink("late", lambda: open_encoder(tiny, backend="onnxrt"))
    late.close()
    with pytest.raises(DeviceError, match="late is closed"):
        late.open()


def test_a_shadow_needs_its_reference_and_says_so_at_the_start(tiny, monkeypatch):
    known = default_registry()

    def entry(name):
        if name == "torch_ref":
            raise UnknownBackendError("no backend is named 'torch_ref'.")
        return Registry.entry(known, name)

    monkeypatch.setattr(known, "entry", entry)
    with pytest.raises(UnknownBackendError, match="torch_ref"):
        open_guarded(open_tower(tiny), Settings(backend="onnxrt", shadow=0.5), (None,))


def test_in_line_a_fallback_that_hangs_is_left_behind_too(tiny, tmp_path):
    settings = Settings(
        backend="onnxrt", fallback="openvino, torch_ref", deadline=0.3, canary="off", breaker_seconds=60
    )
    (guarded,) = open_guarded(open_tower(tiny), settings, (None,))
    patches = random_patches([GRID])
    guarded.links[0].distrust("for the test")
    guarded.links[2].deadline = 60.0  # its first encode may take a second where the machine is busy
    hung = guarded.links[1].open().programs[0]
    gate = hung.session = Gate(hung.session)
    gate.shut()
    (answer,) = guarded.encode_items(patches, [GRID])
    assert answer.fallback
    assert not guarded.links[1].breaker.closed
    gate.let_in()
    guarded.close()
