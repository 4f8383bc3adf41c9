"""The encode service: order, bounds, sharing, deadlines, cancellation, faults and shutdown."""

import asyncio
import gc
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import visionaccel
from gated import gated, image, refuse_once, wait_until
from visionaccel import open_encoder
from visionaccel.encoder import open_tower
from visionaccel.errors import (
    ConfigurationError,
    DeadlineError,
    DeviceError,
    DeviceLostError,
    GridError,
    PatchesError,
    QueueFullError,
    ServiceClosedError,
    SettingsError,
    UnknownBackendError,
)
from visionaccel.service import EmbeddingCache, EncodeService, open_guarded, open_service, open_wanted_service
from visionaccel.settings import Settings

GRID = (1, 4, 4)
SIZE = 4 * 24 * 4  # bytes of the embedding of a 4x4 grid: 4 tokens, 24 wide, float32


@pytest.fixture
def device(tiny):
    return gated(tiny)


@pytest.fixture
def reference(tiny):
    with open_encoder(tiny, backend="torch_ref") as encoder:
        yield encoder


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("visionaccel-")]


# What comes out


def test_embeddings_are_the_encoders(device, reference):
    with EncodeService([device[0]]) as service:
        grids = [GRID, (1, 6, 4), (2, 4, 4)]
        patches = np.concatenate([image(i, grid) for i, grid in enumerate(grids)])
        answers = service.encode(patches, grids)
        assert [len(answer) for answer in answers] == [4, 6, 8]
        np.testing.assert_allclose(np.concatenate(answers), reference.encode(patches, grids), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_embeddings_have_the_wanted_dtype_and_cannot_be_written_to(device, reference, dtype):
    with EncodeService([device[0]], dtype=dtype) as service:
        (answer,) = service.encode(image(1), [GRID])
        assert str(answer.dtype) == dtype
        exact = reference.encode(image(1), [GRID])
        np.testing.assert_array_equal(answer, exact.astype(answer.dtype))
        with pytest.raises(ValueError, match="read-only"):
            answer[0] = 0


def test_torch_tensors_are_taken_in_the_language_models_dtype(device, reference):
    with EncodeService([device[0]]) as service:
        patches = torch.from_numpy(image(1)).bfloat16()
        (answer,) = service.encode(patches, [GRID])
        assert isinstance(answer, np.ndarray)
        np.testing.assert_array_equal(answer, reference.encode(patches, [GRID]).numpy())


def test_from_a_coroutine(device, reference):
    async def ask(service):
        pair = np.concatenate([image(1), image(2)])
        both, one = await asyncio.gather(service.encode_async(pair, [GRID, GRID]), service.submit_async(image(3), GRID))
        return [*both, one]

    with EncodeService([device[0]]) as service:
        answers = asyncio.run(ask(service))
    for seed, answer in zip((1, 2, 3), answers, strict=True):
        np.testing.assert_allclose(answer, reference.encode(image(seed), [GRID]), rtol=0, atol=2e-5)


# Order and bounds


def test_what_is_urgent_goes_before_what_arrived_earlier_and_takes_its_equal_along(device):
    guarded, gate = device
    gate.shut()
    with EncodeService([guarded]) as service:
        service.submit(image(0), GRID)
        gate.wait_for_calls(1)
        futures = [
            service.submit(image(seed, grid), grid, arrival=arrival, urgent=urgent)
            for seed, grid, arrival, urgent in [
                (1, (1, 6, 4), 1.0, False), (2, (1, 8, 4), 2.0, False), (3, (1, 2, 4), 3.0, True),
                (2, (1, 8, 4), 9.0, True),
            ]
        ]  # fmt: skip
        gate.let_in()
        for future in futures:
            future.result(20)
    assert gate.calls == [16, 32, 8, 24]


def test_a_callers_key_stands_for_the_pixels_and_never_for_another_grid(device):
    guarded, gate = device
    with EncodeService([guarded]) as service:
        first = service.submit(image(1), GRID, key="a").result(20)
        assert service.submit(image(1), GRID, key="a").result(20) is first
        assert service.submit(image(1), (1, 2, 8), key="a").result(20) is not first
        assert service.submit(image(1), GRID, key="b").result(20) is not first
        assert service.submit(image(1), GRID).result(20) is not first
        assert service.counters.cached == 1
    assert len(gate.calls) == 4


def test_the_earliest_arrival_goes_first(device):
    guarded, gate = device
    gate.shut()
    with EncodeService([guarded]) as service:
        service.submit(image(0), GRID)
        gate.wait_for_calls(1)
        late = service.submit(image(1, (1, 6, 4)), (1, 6, 4), arrival=50.0)
        early = service.submit(image(2, (1, 8, 4)), (1, 8, 4), arrival=20.0)
        wait_until(lambda: service.counters.waiting == 2)
        gate.let_in()
        late.result()
        early.result()
    assert gate.calls == [16, 32, 24]


def test_a_full_queue_refuses_or_makes_wait(device):
    guarded, gate = device
    gate.shut()
    with EncodeService([guarded], queue_size=1) as service:
        service.submit(image(0), GRID)
        gate.wait_for_calls(1)
        service.submit(image(1), GRID)
        assert not service.room
        with pytest.raises(QueueFullError, match="VISIONACCEL_QUEUE_SIZE"):
            service.submit(image(2), GRID, timeout=0)
        started = time.monotonic()
        with pytest.raises(QueueFullError, match=r"for 0\.05 s"):
            service.submit(image(2), GRID, timeout=0.05)
        assert time.monotonic() - started >= 0.05
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(service.submit, image(3), GRID)
            with pytest.raises(FutureTimeoutError):
                waiting.result(0.05)
            gate.let_in()
            assert waiting.result(20).result(20).shape == (4, 24)
        assert service.counters.submitted == 3


def test_a_coroutine_waits_for_room_without_blocking_the_loop_and_may_give_up(device):
    guarded, gate = device
    gate.shut()

    async def ask(service):
        first = asyncio.create_task(service.submit_async(image(0), GRID))
        second = asyncio.create_task(service.submit_async(image(1), GRID))
        await asyncio.sleep(0.05)
        gate.wait_for_calls(1)
        gives_up = asyncio.create_task(service.submit_async(image(2), GRID))
        third = asyncio.create_task(service.submit_async(image(3), GRID))
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in (first, second, gives_up, third))
        gives_up.cancel()
        gate.let_in()
        answers = await asyncio.gather(first, second, third)
        with pytest.raises(asyncio.CancelledError):
            await gives_up
        return answers

    with EncodeService([guarded], queue_size=1) as service:
        assert len(asyncio.run(ask(service))) == 3
        assert service.room
        assert service.counters.submitted == 3


def test_a_coroutine_that_waits_for_room_is_woken_and_looks_no_sooner(device, monkeypatch):
    guarded, gate = device
    gate.shut()
    looks = []

    async def ask(service):
        enter = service._state.enter
        monkeypatch.setattr(service._state, "enter", lambda *given: looks.append(given) or enter(*given))
        waits = asyncio.create_task(service.submit_async(image(2), GRID))
        await asyncio.sleep(0.3)
        assert len(looks) == 1
        gate.let_in()
        return await waits

    with EncodeService([guarded], queue_size=1) as service:
        service.submit(image(0), GRID)
        gate.wait_for_calls(1)
        service.submit(image(1), GRID)
        assert asyncio.run(ask(service)).shape == (4, 24)


def test_a_coroutine_that_waits_for_room_learns_that_the_service_closes(device):
    guarded, gate = device
    gate.shut()

    async def ask(service):
        waits = asyncio.create_task(service.submit_async(image(2), GRID))
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(asyncio.to_thread(service.close))
        with pytest.raises(ServiceClosedError):
            await waits
        gate.let_in()
        await closing

    service = EncodeService([guarded], queue_size=1)
    service.submit(image(0), GRID)
    gate.wait_for_calls(1)
    service.submit(image(1), GRID)
    asyncio.run(ask(service))


def test_a_coroutine_that_need_not_wait_leaves_nothing_behind(device):
    async def ask(service):
        return [await service.submit_async(image(1), GRID) for _ in range(20)]

    with EncodeService([device[0]]) as service:
        asyncio.run(ask(service))
        assert service.counters.cached == 19
        assert service._state.change._done_callbacks == []


# Sharing


def test_equal_items_in_flight_are_encoded_once(device):
    guarded, gate = device
    gate.shut()
    with EncodeService([guarded], cache=0) as service:
        first = service.submit(image(0), GRID)
        gate.wait_for_calls(1)
        same_running = service.submit(image(0), GRID)
        queued = service.submit(image(1), GRID)
        same_queued = service.submit(image(1), GRID)
        wait_until(lambda: service.counters.merged == 2)
        assert service.counters.waiting == 1
        gate.let_in()
        assert first.result() is same_running.result()
        assert queued.result() is same_queued.result()
    assert gate.calls == [16, 16]


def test_an_equal_item_that_arrived_earlier_takes_its_equal_along(device):
    guarded, gate = device
    gate.shut()
    with EncodeService([guarded]) as service:
        service.submit(image(0), GRID)
        gate.wait_for_calls(1)
        other = service.submit(image(1, (1, 6, 4)), (1, 6, 4), arrival=5.0)
        late = service.submit(image(2, (1, 8, 4)), (1, 8, 4), arrival=9.0)
        early = service.submit(image(2, (1, 8, 4)), (1, 8, 4), arrival=1.0)
        wait_until(lambda: service.counters.merged == 1)
        gate.let_in()
        for future in (other, late, early):
            future.result()
    assert gate.calls == [16, 32, 24]


@pytest.mark.parametrize(
    "other",
    [
        lambda: (image(8), GRID),
        lambda: (image(7), (1, 2, 8)),
        lambda: (image(7).astype(ml_dtypes.bfloat16), GRID),
    ],
    ids=["other pixels", "other grid", "other dtype"],
)
def test_what_differs_in_pixels_grid_or_dtype_is_encoded_itself(device, other):
    guarded, gate = device
    with EncodeService([guarded]) as service:
        service.encode(image(7), [GRID])
        service.submit(*other()).result()
        assert service.counters.cached == 0
        service.encode(image(7), [GRID])
        assert service.counters.cached == 1
    assert len(gate.calls) == 2


def test_two_backends_never_share_an_embedding(tiny):
    cache = EmbeddingCache(2**20)
    tower = open_tower(tiny)
    for backend, hits in (("torch_ref", 0), ("onnxrt", 0), ("torch_ref", 1)):
        with EncodeService(open_guarded(tower, Settings(backend=backend), (None,)), cache=cache) as service:
            service.encode(image(1), [GRID])
            assert service.counters.cached == hits, backend


def test_other_options_or_weights_share_no_embedding(tiny, tmp_path_factory):
    from visionaccel_testing.checkpoints import random_checkpoint

    cache = EmbeddingCache(2**20)
    other = random_checkpoint(tmp_path_factory.mktemp("other"), seed=5)
    for checkpoint, options in ((tiny, {}), (tiny, {"dtype": "bfloat16"}), (tiny, {"attention": "eager"}), (other, {})):
        settings = Settings(backend="torch_ref", options=options)
        with EncodeService(open_guarded(open_tower(checkpoint), settings, (None,)), cache=cache) as service:
            service.encode(image(1), [GRID])
            assert service.counters.cached == 0


def test_the_fallbacks_embeddings_are_not_kept_under_the_devices_name(tiny, reference):
    guarded, gate = gated(tiny, fallback=lambda: reference)
    gate.fail = lambda patches: OSError("gone")
    with EncodeService([guarded]) as service:
        service.encode(image(1), [GRID])
        assert service.counters.fallback == 1
        gate.fail = lambda patches: None
        service.encode(image(1), [GRID])
        assert (service.counters.fallback, service.counters.cached) == (1, 0)
        service.encode(image(1), [GRID])
        assert service.counters.cached == 1


def test_the_cache_keeps_what_was_used_last_within_its_bytes():
    cache = EmbeddingCache(3 * SIZE)
    rows = {name: np.zeros((4, 24), np.float32) for name in "abcd"}
    for name in "abc":
        cache.put(name, rows[name])
    assert cache.get("a") is rows["a"]
    cache.put("d", rows["d"])
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, True]
    assert (cache.held, cache.evicted) == (3 * SIZE, 1)
    cache.put("d", np.zeros((8, 24), np.float32))
    assert cache.held == 3 * SIZE
    cache.put("huge", np.zeros((100, 24), np.float32))
    assert (cache.held, cache.get("huge")) == (3 * SIZE, None), "what cannot be kept takes nothing else's place"


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 8)), max_size=40), st.integers(0, 20))
def test_the_cache_is_always_within_its_bytes(puts, size):
    cache = EmbeddingCache(size * 16)
    for name, tokens in puts:
        cache.put(name, np.zeros((tokens, 4), np.float32))
        assert cache.held <= size * 16
        assert cache.held == sum(entry.nbytes for entry in cache._entries.values())


@given(st.lists(st.sampled_from(["begin", "put", "clear"]), max_size=40))
def test_the_cache_keeps_nothing_whose_computation_began_before_it_was_cleared(steps):
    cache, begun = EmbeddingCache(2**20), []
    for number, step in enumerate(steps):
        if step == "begin":
            begun.append((str(number), cache.generation))
        elif step == "clear":
            cache.clear()
            assert cache.held == 0
        elif begun:
            key, generation = begun.pop(0)
            kept = cache.put(key, np.zeros((4, 24), np.float32), generation)
            assert kept == (generation == cache.generation) == (cache.get(key) is not None)


# Devices


def test_items_go_to_the_device_that_is_free(tiny):
    (one, first), (two, second) = gated(tiny), gated(tiny)
    first.shut()
    with EncodeService([one, two]) as service:
        blocked = service.submit(image(0), GRID)
        wait_until(lambda: first.inside or second.calls)
        answers = [service.submit(image(i), GRID) for i in range(1, 5)]
        while not first.inside:  # the other one took it
            answers.append(service.submit(image(len(answers) + 10), GRID))
            time.sleep(0.01)
        done = [answer for answer in answers if not answer.done()]
        wait_until(lambda: sum(not future.done() for future in [blocked, *answers]) == 1)
        assert len(first.calls) == 1
        assert len(second.calls) >= 4
        first.let_in()
        assert all(future.result() is not None for future in [blocked, *done])


def test_as_many_calls_are_in_progress_as_the_session_declares(tiny):
    guarded, gate = gated(tiny, thread_safe=True, max_in_flight=3)
    gate.shut()
    with EncodeService([guarded]) as service:
        futures = [service.submit(image(i), GRID) for i in range(6)]
        gate.wait_for_calls(3)
        time.sleep(0.05)
        assert gate.inside == 3
        gate.let_in()
        assert all(future.result() is not None for future in futures)
    assert gate.most_inside == 3


def test_a_service_whose_threads_cannot_all_start_leaves_none(tiny, monkeypatch):
    guarded, _ = gated(tiny, thread_safe=True, max_in_flight=3, device="starved")
    refused = refuse_once(monkeypatch, "visionaccel-starved-1")
    with pytest.raises(RuntimeError, match="new thread"):
        EncodeService([guarded])
    assert len(refused) == 1
    wait_until(lambda: not any(thread.name.startswith("visionaccel-starved") for thread in threads()))
    guarded.close()


def test_a_session_that_is_not_thread_safe_gets_one_call_at_a_time_whatever_else_it_says(tiny):
    guarded, gate = gated(tiny, thread_safe=False, max_in_flight=3)
    with EncodeService([guarded]) as service:
        assert [future.result() is not None for future in [service.submit(image(i), GRID) for i in range(6)]]
    assert gate.most_inside == 1


def test_devices_that_compute_different_numbers_are_refused(tiny):
    with open_encoder(tiny, backend="onnxrt"):
        one, _ = gated(tiny)
        two, _ = gated(tiny, precision="bfloat16")
        with pytest.raises(ConfigurationError, match="all devices of an encode service must run the same"):
            EncodeService([one, two])
    with pytest.raises(ConfigurationError, match="needs at least one encoder"):
        EncodeService([])


def test_the_settings_open_an_encoder_on_each_device(tiny):
    before = set(threads())
    settings = Settings(backend="onnxrt", devices=("cpu", "cpu"), queue_size=7, deadline=3.0)
    with open_wanted_service(open_tower(tiny), settings) as service:
        assert [encoder.primary.capabilities.device for encoder in service.encoders] == ["cpu", "cpu"]
        assert len(service.encode(np.concatenate([image(1), image(2)]), [GRID, GRID])) == 2
    assert set(threads()) == before


def test_a_device_in_this_process_takes_three_threads(tiny):
    before = set(threads())
    with open_service(tiny, backend="onnxrt", fallback="torch_ref") as service:
        service.encode(np.concatenate([image(1), image(2)]), [GRID, GRID])
        shared = {thread for thread in threads() if thread.name == "visionaccel-background"}  # another test's, maybe
        names = sorted(thread.name for thread in set(threads()) - before | shared)
    assert names == ["visionaccel-background", "visionaccel-call", "visionaccel-cpu-0"]


def test_a_device_that_cannot_start_leaves_nothing_open_and_the_fallback_takes_its_place(tiny, caplog):
    with pytest.raises(ConfigurationError, match="VitisAI"):
        open_service(tiny, backend="onnxrt", devices=["cpu", "npu"])
    with open_service(tiny, backend="onnxrt", devices=["cpu", "npu"], fallback="torch_ref") as service:
        assert [encoder.primary.backend for encoder in service.encoders] == ["torch_ref"]
    assert "Starting with the fallback 'torch_ref', because" in caplog.text


def test_a_service_is_opened_by_name_and_refuses_what_makes_no_sense(tiny, monkeypatch):
    monkeypatch.setenv("VISIONACCEL_DEVICE", "npu")  # the environment has no say
    with visionaccel.open_service(tiny, backend="torch_ref", options={"dtype": "bfloat16"}, dtype="float16") as service:
        assert service.encoders[0].primary.capabilities.precision == "bfloat16"
        assert service.encode(image(1), [GRID])[0].dtype == np.float16
    with pytest.raises(SettingsError, match="QUEUE_SIZE=0"):
        visionaccel.open_service(tiny, queue_size=0)
    with pytest.raises(ConfigurationError, match="unknown dtype 'int8' of embeddings"):
        visionaccel.open_service(tiny, dtype="int8")


# Faults


def test_an_item_that_fails_fails_alone_and_may_be_tried_again(device):
    guarded, gate = device
    gate.fail = lambda patches: OSError("DRM_IOCTL failed") if patches[0, 0] == image(1)[0, 0] else None
    with EncodeService([guarded]) as service:
        futures = [service.submit(image(i), GRID) for i in range(3)]
        assert futures[0].result().shape == futures[2].result().shape == (4, 24)
        with pytest.raises(DeviceError, match="DRM_IOCTL failed"):
            futures[1].result()
        gate.fail = lambda patches: None
        assert service.submit(image(1), GRID).result().shape == (4, 24)
        counters = service.counters
        assert (counters.submitted, counters.encoded, counters.failed) == (4, 3, 1)


def test_wrong_input_is_refused_by_type(device):
    with EncodeService([device[0]]) as service:
        with pytest.raises(GridError):
            service.submit(image(1), (1, 3, 4))
        with pytest.raises(PatchesError, match="16 patches were given, but grid 1x4x8 has 32"):
            service.submit(image(1), (1, 4, 8))
        with pytest.raises(PatchesError, match="describe 32"):
            service.encode(image(1), [GRID, GRID])
        with pytest.raises(PatchesError, match="cannot be read"):
            service.submit([None] * 16, GRID).result()
        with pytest.raises(PatchesError, match="expects"):
            service.submit(image(1)[:, :50], GRID).result()
        assert service.encode(image(1), [GRID])[0].shape == (4, 24)


# Deadlines


def test_a_call_past_the_deadline_fails_its_item_and_the_device_goes_on_when_it_returns(tiny, caplog):
    guarded, gate = gated(tiny, deadline=1.0)
    gate.shut()
    with EncodeService([guarded]) as service:
        hung = service.submit(image(0), GRID)
        behind = service.submit(image(1), GRID)
        with pytest.raises(DeadlineError, match=r"within 1 s"):
            hung.result(20)
        assert not behind.done()
        gate.let_in()
        assert behind.result(20).shape == (4, 24)
        assert service.submit(image(0), GRID).result(20).shape == (4, 24)
        counters = service.counters
        assert (counters.failed, counters.expired, counters.encoded) == (1, 1, 2), "what came late counts no more"
    assert "did not answer within 1 s" in caplog.text


def test_while_every_device_hangs_nothing_waits_for_ever(tiny):
    guarded, gate = gated(tiny, deadline=0.5)
    gate.shut()
    service = EncodeService([guarded])
    futures = [service.submit(image(i), GRID) for i in range(3)]
    for future, kind in zip(futures, (DeadlineError, DeviceLostError, DeviceLostError), strict=True):
        with pytest.raises(kind):
            future.result(20)
    later = service.submit(image(5), GRID)
    with pytest.raises(DeviceLostError, match="Restart the server"):
        later.result(20)
    gate.let_in()
    wait_until(lambda: service.counters.running == 0)
    assert service.submit(image(6), GRID).result(20).shape == (4, 24)
    service.close()


def test_an_item_whose_devices_are_distrusted_in_each_try_fails_and_its_device_goes_on(device):
    guarded, gate = device
    with EncodeService([guarded]) as service:
        gate.fail = lambda _: service.cache.clear()  # as when another device is found to give wrong answers
        future = service.submit(image(1), GRID)
        gate.wait_for_calls(1)
        try:
            with pytest.raises(DeviceError, match="wrong answers during each of 3 tries"):
                future.result(20)
        finally:
            gate.fail = lambda _: None
        assert (len(gate.calls), service.cache.held) == (3, 0)
        assert service.encode(image(1), [GRID])[0].shape == (4, 24)


def test_a_device_that_hangs_again_and_again_but_returns_harms_nobody_else(tiny):
    guarded, gate = gated(tiny, deadline=2.0)
    blocked = {image(9)[0, 0]}
    gate.block = lambda patches: patches[0, 0] in blocked
    with EncodeService([guarded]) as service:
        waits = service.submit(image(9), GRID, arrival=float("inf"))
        gate.wait_for_calls(1)  # it went first all the same, as the only one
        with pytest.raises(DeadlineError):
            waits.result(20)
        patient = service.submit(image(8), GRID, arrival=float("inf"))
        for seed in (5, 6):  # longer than the deadline in all
            hangs = service.submit(image(seed), GRID)
            blocked = {image(seed)[0, 0]}
            gate.let_in(0)
            with pytest.raises(DeadlineError, match="did not answer"):
                hangs.result(20)
            assert not patient.done()
        blocked = set()
        gate.let_in(0)
        assert patient.result(20).shape == (4, 24)


def test_a_device_that_hangs_in_a_process_of_its_own_leaves_the_item_to_the_fallback(tiny, reference, tmp_path):
    switch = tmp_path / "faults.json"
    options = {"latency": 0.01, "switch": str(switch)}
    service = open_service(
        tiny,
        backend="simulated",
        devices=["onnxrt"],
        options=options,
        isolation="process",
        fallback="torch_ref",
        deadline=2.0,
    )
    with service:
        switch.write_text('[{"all": true, "do": "hang"}]')
        (answer,) = service.encode(image(1), [GRID])
        np.testing.assert_allclose(answer, reference.encode(image(1), [GRID]), rtol=0, atol=2e-5)
        assert (service.counters.fallback, service.counters.failed) == (1, 0)


# Cancellation


def test_what_nobody_wants_any_more_is_not_encoded(device):
    guarded, gate = device
    gate.shut()
    with EncodeService([guarded], queue_size=2) as service:
        service.submit(image(0), GRID)
        gate.wait_for_calls(1)
        dropped = service.submit(image(1, (1, 6, 4)), (1, 6, 4))
        halved = [service.submit(image(2, (1, 8, 4)), (1, 8, 4)) for _ in range(1)]
        assert dropped.cancel()
        wait_until(lambda: service.room)
        halved.append(service.submit(image(2, (1, 8, 4)), (1, 8, 4)))
        wait_until(lambda: service.counters.merged == 1)
        assert halved[0].cancel()
        gate.let_in()
        assert halved[1].result().shape == (8, 24)
        with pytest.raises(CancelledError):
            dropped.result()
        assert service.counters.cancelled == 1
    assert gate.calls == [16, 32]


def test_what_is_taken_back_leaves_no_pixels_behind(device):
    guarded, gate = device
    gate.shut()
    with EncodeService([guarded], queue_size=2) as service:
        service.submit(image(0), GRID)
        gate.wait_for_calls(1)
        for i in range(300):
            patches = image(i)
            service.submit(patches, GRID).cancel()
            assert sys.getrefcount(patches) == 2, "only this test has it"
        assert service.counters.waiting == 0
        gate.let_in()


def test_cancelling_what_a_device_works_on_keeps_the_answer_for_others(device):
    guarded, gate = device
    gate.shut()
    with EncodeService([guarded]) as service:
        future = service.submit(image(0), GRID)
        gate.wait_for_calls(1)
        assert future.cancel()
        gate.let_in()
        assert service.submit(image(0), GRID).result().shape == (4, 24)
    assert gate.calls == [16]


# Shutdown


def test_closing_answers_everybody_and_ends_every_thread(device):
    guarded, gate = device
    before = set(threads())
    gate.shut()
    service = EncodeService([guarded], queue_size=2)
    running = service.submit(image(0), GRID)
    gate.wait_for_calls(1)
    waiting = [service.submit(image(i), GRID) for i in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        wants_in = pool.submit(service.submit, image(3), GRID)
        closing = pool.submit(service.close)
        for future in (*waiting, wants_in):
            with pytest.raises(ServiceClosedError):
                future.result(20)
        gate.let_in()
        closing.result(20)
    assert running.result().shape == (4, 24)
    assert gate.closed
    assert set(threads()) == before
    with pytest.raises(ServiceClosedError):
        service.submit(image(0), GRID)
    service.close()


def test_draining_encodes_what_waits_first(device):
    guarded, gate = device
    gate.shut()
    service = EncodeService([guarded])
    futures = [service.submit(image(i), GRID) for i in range(4)]
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(service.close, drain=True)
        gate.let_in()
        closing.result(20)
    assert [future.result().shape for future in futures] == [(4, 24)] * 4


def test_a_call_that_never_returns_does_not_hold_up_the_end(device, caplog):
    guarded, gate = device
    gate.shut()
    service = EncodeService([guarded])
    running = service.submit(image(0), GRID)
    gate.wait_for_calls(1)
    service.close(wait=0.1)
    with pytest.raises(ServiceClosedError, match="while it encoded the item"):
        running.result(20)
    assert "A call of encoder 'gated' has not returned, so its device is not released" in caplog.text
    gate.let_in()


# All of it at once


@hypothesis_settings(max_examples=25)
@given(
    actions=st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["keep", "keep", "keep", "cancel"])), max_size=40),
    broken=st.sets(st.integers(0, 7), max_size=2),
    cache=st.sampled_from([0, SIZE, 2**20]),
    calls=st.sampled_from([1, 3]),
    keyed=st.booleans(),
)
def test_every_future_ends_with_its_own_answer(tiny, actions, broken, cache, calls, keyed):
    guarded, gate = gated(tiny, thread_safe=True, max_in_flight=calls)
    firsts = {image(seed)[0, 0] for seed in broken}
    gate.fail = lambda patches: OSError("broken") if patches[0, 0] in firsts else None
    exact = {seed: guarded.primary.encode(image(seed), [GRID]) for seed in set(range(8)) - broken}
    with EncodeService([guarded], queue_size=4, cache=cache) as service:
        futures = []
        for seed, action in actions:
            future = service.submit(image(seed), GRID, key=str(seed) if keyed else None)
            if action == "cancel":
                future.cancel()
            futures.append((seed, action, future))
        for seed, action, future in futures:
            try:
                answer = future.result(20)
            except CancelledError:
                assert action == "cancel"
            except DeviceError:
                assert seed in broken
            else:
                assert seed not in broken
                np.testing.assert_allclose(answer, exact[seed], rtol=0, atol=2e-5)
        wait_until(lambda: service.counters.running == 0)
        assert (service.counters.waiting, service._state._by_key) == (0, {})


@hypothesis_settings(max_examples=15)
@given(
    schedule=st.lists(st.sampled_from(["right", "error", "hang"]), max_size=6),
    devices=st.integers(1, 2),
    calls=st.integers(1, 2),
    returns=st.booleans(),
    seeds=st.lists(st.integers(0, 3), min_size=1, max_size=10),
)
def test_every_future_ends_whatever_hangs(tiny, schedule, devices, calls, returns, seeds):
    todo, held, limit = list(schedule), threading.Event(), 0.15
    if returns:
        held.set()

    def happen(_):
        action = todo.pop(0) if todo else "right"
        if action == "hang":
            time.sleep(2 * limit)
            held.wait(30)
        return OSError("gone") if action == "error" else None

    guarded = [gated(tiny, deadline=limit, thread_safe=True, max_in_flight=calls) for _ in range(devices)]
    for _, gate in guarded:
        gate.fail = happen
    service = EncodeService([chain for chain, _ in guarded], queue_size=2, cache=0)
    started = time.monotonic()
    futures = [service.submit(image(seed), GRID) for seed in seeds]
    for future in futures:
        error = future.exception(20)
        assert error is None or isinstance(error, DeviceError)
    # Each hang costs its own deadline and the next one's; what a busy machine adds to that.
    assert time.monotonic() - started < 2 * limit * (len(schedule) + 1) + 5
    service.close(wait=limit)
    assert all(future.done() for future in futures)
    held.set()


def test_nothing_is_left_after_many_services(tiny):
    def files():
        return len(list(Path("/proc/self/fd").iterdir()))

    tower = open_tower(tiny)
    gc.collect()  # what earlier tests left open must not be closed while this one counts
    kept, held = set(threads()), files()
    for _ in range(10):
        with open_service(tower, backend="torch_ref", cache_size=4 * SIZE) as service:
            futures = [service.submit(image(i % 9), GRID) for i in range(60)]
            for future in futures[::3]:
                future.cancel()
            for future in futures[1::3]:
                future.result(20)
    gc.collect()
    wait_until(lambda: set(threads()) <= kept)  # those of earlier tests may end by themselves
    assert files() <= held


@pytest.mark.parametrize(("names", "error"), [("onnx", UnknownBackendError), ("auto", SettingsError)])
def test_a_fallback_that_is_not_installed_is_refused_before_it_is_needed(tiny, names, error):
    with pytest.raises(error):
        open_service(tiny, backend="onnxrt", fallback=names)
