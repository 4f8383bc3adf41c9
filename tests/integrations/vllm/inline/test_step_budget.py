"""The encodes of one step end before vLLM ends the engine, however many images it has and whatever hangs."""

import gc
import threading
import time
import weakref

import pytest
import torch
from test_visual import receiving

from gated import Gate, gated, wait_until
from towers import random_patches
from visionaccel import open_encoder
from visionaccel.errors import DeadlineError, DeviceError
from visionaccel.integrations.vllm.compat import worker
from visionaccel.integrations.vllm.inline import visual
from visionaccel.integrations.vllm.inline.visual import LateOpening, StepBudget
from visionaccel.settings import Settings
from visionaccel.trust import GuardedEncoder

__all__ = ["receiving"]

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations

GRID = (1, 4, 4)


@pytest.fixture
def step(receiving, monkeypatch):
    """A tower whose steps may take some seconds, and what it reports."""

    def make(seconds, **settings):
        faults = []
        monkeypatch.setattr(worker, "worker_connector", lambda: None)
        monkeypatch.setattr(worker, "step_timeout", lambda: seconds / 0.8)
        monkeypatch.setattr(visual, "report_fault", lambda fault, _: faults.append(fault.message) or True)
        return receiving(**settings), faults

    return make


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("fallback", ["none", "openvino,torch_ref"])
def test_a_hang_costs_no_more_than_the_budget_whatever_the_number_of_images(step, images, fallback):
    made, faults = step(1.0, BACKEND="onnxrt", FALLBACK=fallback, DEADLINE="60", CANARY="off")
    encoder, gates = made._encoder.result(time.monotonic() + 60), []
    for link in encoder.links:
        (opened,) = link.open().programs
        gates.append(Gate(opened.session))
        opened.session = gates[-1]
        gates[-1].shut()
    made.budget.end_step()
    started = time.monotonic()
    rows = made(torch.from_numpy(random_patches([GRID] * images)), [list(GRID)] * images)
    assert time.monotonic() - started < 1.0 + 3.0
    assert rows.shape == (4 * images, 24)
    assert len(faults) == images
    for gate in gates:
        gate.let_in()
    encoder.close()


def test_several_encodes_of_a_step_share_its_budget_and_the_next_step_has_its_own(step):
    made, _ = step(50.0, BACKEND="torch_ref")
    with made.budget.encode() as first:
        pass
    with made.budget.encode() as second:
        pass
    assert first == second
    made.budget.end_step()
    with made.budget.encode() as third:
        assert third > second


def test_a_server_that_only_encodes_tells_steps_apart_by_their_metadata(monkeypatch):
    steps = [object()]
    monkeypatch.setattr(worker, "step_metadata", lambda: steps[-1])
    budget = StepBudget()
    with budget.encode() as first:
        pass
    with budget.encode() as same:
        pass
    steps.append(object())
    with budget.encode() as other:
        assert other > same == first


def test_what_a_dummy_run_left_is_no_limit_of_the_first_step(monkeypatch):
    monkeypatch.setattr(visual, "_PAUSE", 0.05)
    budget = StepBudget()
    with budget.encode() as dummy:
        pass
    time.sleep(0.1)
    with budget.encode() as first:
        assert first > dummy


def test_an_item_for_which_the_step_has_no_time_is_not_encoded(tiny):
    guarded, gate = gated(tiny)
    answers = guarded.encode_items(random_patches([GRID] * 2), [GRID] * 2, until=time.monotonic() - 1)
    assert all(isinstance(answer, DeadlineError) for answer in answers)
    assert gate.calls == []
    guarded.close()


def test_settings_that_leave_no_time_for_the_fallback_are_told_with_numbers():
    budget = StepBudget()
    assert budget.seconds == 240
    assert budget.warning(Settings(backend="onnxrt", fallback="torch_ref")) is None
    said = budget.warning(Settings(backend="onnxrt", fallback="torch_ref", deadline=200.0))
    assert "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=300" in said
    assert "VISIONACCEL_DEADLINE to at most 120" in said


def test_an_encoder_that_opens_slowly_holds_up_a_step_for_its_budget_and_is_used_by_a_later_one(tiny):
    made = []

    def slow():
        time.sleep(1.0)
        made.append(GuardedEncoder(open_encoder(tiny, backend="onnxrt")))
        return made[0]

    opening = LateOpening(slow)
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="still being opened"):
        opening.result(started + 0.1)
    assert time.monotonic() - started < 0.9
    with pytest.raises(DeadlineError):
        opening.result(time.monotonic() + 0.1)
    while not made:
        time.sleep(0.05)
    assert opening.result(time.monotonic() + 5) is made[0]


def test_an_encoder_that_opens_after_its_weights_were_replaced_is_closed_and_leaves_no_thread(step, tiny):
    tower, _ = step(0.2, BACKEND="onnxrt")
    before, held, made = set(threading.enumerate()), threading.Event(), []

    def slow():
        held.wait(30)
        made.append(GuardedEncoder(open_encoder(tiny, backend="onnxrt")))
        return made[0]

    tower._encoder = LateOpening(slow)
    (answer,) = tower._encode(torch.from_numpy(random_patches([GRID])), [list(GRID)])
    assert isinstance(answer, DeadlineError)
    tower._encoder.close()
    held.set()
    wait_until(lambda: made and made[0].closed)
    wait_until(lambda: not [each for each in set(threading.enumerate()) - before if "visionaccel" in each.name])


@pytest.mark.parametrize(
    "error", [DeviceError("out of memory."), RuntimeError("out of memory.")], ids=["ours", "a-vendors"]
)
def test_an_encoder_that_could_not_be_opened_is_opened_again_after_a_pause(monkeypatch, error):
    monkeypatch.setattr(visual, "_FIRST_PAUSE", 0.1)
    answers = [error, "open"]

    def make():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    opening = LateOpening(make)
    for _ in range(2):
        with pytest.raises(DeviceError, match="out of memory"):
            opening.result(time.monotonic() + 5)
    time.sleep(0.15)
    assert opening.result(time.monotonic() + 5) == "open"


def test_a_failed_opening_keeps_nothing_of_the_steps_that_it_fails():
    def fail():
        raise DeviceError("out of memory.")

    def step(pixels):
        with pytest.raises(DeviceError, match="out of memory"):
            opening.result(time.monotonic() + 5)
        return weakref.ref(pixels)

    opening = LateOpening(fail)
    first = step(torch.zeros(1))
    step(torch.zeros(1))
    gc.collect()
    assert first() is None


def test_where_no_thread_can_be_started_the_encoder_is_opened_by_a_later_step(monkeypatch):
    opening = LateOpening(lambda: "open")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start thread")))
        with pytest.raises(DeviceError, match="can't start thread"):
            opening.result(time.monotonic() + 5)
    assert opening.result(time.monotonic() + 5) == "open"


def test_closing_a_late_opening_closes_its_encoder_and_does_nothing_after_a_failure(tiny):
    guarded = GuardedEncoder(open_encoder(tiny, backend="onnxrt"))
    opening = LateOpening(lambda: guarded)
    assert opening.result(time.monotonic() + 30) is guarded
    opening.close()
    assert guarded.closed

    def fail():
        raise DeviceError("out of memory.")

    failed = LateOpening(fail)
    with pytest.raises(DeviceError):
        failed.result(time.monotonic() + 5)
    failed.close()
