"""The pipelined mode under every order of scheduling, aborts, preemption and caching.

vLLM's real schedulers with the EC connector and a real encode service drive a worker that is modelled by what it holds.
"""

import gc
import io
import shutil
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from pickle import PickleBuffer, Pickler, loads
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gated import Gate, wait_until
from modelled_engine import GOOD, GRID, IMAGES, TAINTED, Engine, Worker, forget, make, pixels
from visionaccel import open_encoder
from visionaccel.backends import Session
from visionaccel.encoder import open_tower, source_digest
from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm.activation import choose_mode
from visionaccel.integrations.vllm.compat import architectures, engine_config
from visionaccel.integrations.vllm.encoder_source import Replacement
from visionaccel.integrations.vllm.pipelined import self_test
from visionaccel.integrations.vllm.pipelined.pending_images import PendingImages, WantedItem
from visionaccel.integrations.vllm.shared_memory import _VARIABLE as MEMORY
from visionaccel.integrations.vllm.shared_memory import make_shared_memory
from visionaccel.settings import load_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations


class PipelinedWorker(Worker):
    """A worker that is sent its embeddings, and whose own encoder works; it knows what each image's must be."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def is_right(self, identifier, rows):
        image = int(identifier.removeprefix("image"))
        return bool(np.allclose(rows, self.exact[image], rtol=0, atol=1e-4))


class PipelinedEngine(Engine):
    def __init__(self, scheduler, exact):
        super().__init__(scheduler, PipelinedWorker(exact))

    def step(self):
        super().step()
        self.check_waiting()

    def check_waiting(self):
        """What waits for an image holds no memory for keys."""
        scheduler = self.scheduler
        for request in (*scheduler.waiting, *getattr(scheduler, "skipped_waiting", ())):
            assert not any(map(len, scheduler.kv_cache_manager.get_block_ids(request.request_id)))


@pytest.fixture(scope="module")
def exact(digits):
    """Each image's embedding."""
    with open_encoder(digits, backend="onnxrt") as encoder:
        return [encoder.encode(pixels(image), [GRID]) for image in range(IMAGES)]


def make_pipelined(kind, digits, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MEMORY, "")
        make_shared_memory()
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VISIONACCEL_BACKEND", "onnxrt")
        for name, value in settings.items():
            patch.setenv("VISIONACCEL_" + name, str(value))
        architectures.register_models()  # vLLM loads its plug-ins once, maybe for a test before
        scheduler = make(digits, kind, pipelined=True)
        opened = scheduler.ec_connector._service.encoders[0].primary.programs[0]
        opened.session = Gate(opened.session)
        return scheduler, opened.session


@pytest.fixture(scope="module", params=["sync", "async"])
def pipelined(request, digits):
    """A scheduler in the pipelined mode with almost no cache of embeddings, and the gate of its device."""
    scheduler, gate = make_pipelined(request.param, digits, CACHE_SIZE=10_000)
    yield scheduler, gate
    scheduler.shutdown()


def fresh(scheduler, gate, exact):
    """An engine whose caches are empty and whose device is well."""
    gate.fail = lambda patches: None
    forget(scheduler)
    scheduler.ec_connector._service.cache.clear()
    scheduler.ec_connector._cached.clear()
    return PipelinedEngine(scheduler, exact)


@pytest.fixture
def engine(pipelined, exact):
    return fresh(*pipelined, exact)


def breaks(images):
    firsts = {float(pixels(image)[0, 0]) for image in images}
    return lambda patches: OSError("DRM_IOCTL failed") if float(patches[0, 0]) in firsts else None


def assert_nothing_is_left(connector):
    assert (len(connector._pending_images._pending), connector._pending_images.held) == (0, 0)
    assert (connector._items, connector._loads) == ({}, {})
    assert (connector._pending_images.requests(), connector._pending_images._waiting) == ([], {})
    wait_until(lambda: connector._service.counters.running == 0)
    assert connector._service.counters.waiting == 0


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.lists(st.integers(0, IMAGES - 1), max_size=3), st.integers(1, 20)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 5)),
    st.tuples(st.just("break"), st.sets(st.integers(0, IMAGES - 1))),
    st.tuples(st.just("pause"), st.sampled_from([0.001, 0.01])),
)


def test_one_device_in_the_engines_process_takes_three_threads(digits, exact):
    before = set(threading.enumerate())
    scheduler, gate = make_pipelined("sync", digits)
    engine = fresh(scheduler, gate, exact)
    engine.add([0], 3)
    engine.drain()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("visionaccel-")]
    # That in the background does the work of other services of this process, too.
    names = [each.name for each in threads if each not in before or each.name == "visionaccel-background"]
    scheduler.shutdown()
    assert sorted(names) == ["visionaccel-background", "visionaccel-call", "visionaccel-cpu-0"]


@given(actions=st.lists(ACTIONS, min_size=4, max_size=40))
@hypothesis_settings(max_examples=100)
def test_every_request_ends_and_reads_its_own_images(pipelined, exact, actions):
    scheduler, gate = pipelined
    engine = fresh(scheduler, gate, exact)
    names, ever_broken = {}, set()
    for action, *values in actions:
        if action == "add":
            names[engine.add(*values)] = values[0]
        elif action == "step":
            for _ in range(values[0]):
                engine.step()
        elif action == "abort" and names:
            engine.abort(list(names)[values[0] % len(names)])
        elif action == "break":
            ever_broken |= values[0]
            gate.fail = breaks(values[0])
        elif action == "pause":
            time.sleep(values[0])
    engine.drain()
    assert not any(TAINTED in tokens for tokens in engine.answers.values())
    assert engine.worker.encoded == 0
    assert set(engine.endings) == set(names)
    for name, ending in engine.endings.items():
        if ending == "length":
            assert engine.answers[name] == [GOOD] * 3
        else:
            assert ending == "abort" or (ending == "error" and ever_broken & set(names[name]))
    assert_nothing_is_left(scheduler.ec_connector)

    # With the device well again, every image is right again, whatever the caches hold.
    gate.fail = lambda patches: None
    again = [engine.add([image, image], 5) for image in range(IMAGES)]
    engine.drain()
    assert all(engine.answers[name] == [GOOD] * 3 and engine.endings[name] == "length" for name in again)


def test_only_requests_with_the_faulty_image_fail_and_say_why(engine, pipelined):
    pipelined[1].fail = breaks({1})
    names = [engine.add([0], 3), engine.add([1], 3), engine.add([2, 1], 3), engine.add([], 6)]
    engine.drain()
    assert [engine.endings[name] for name in names] == ["length", "error", "error", "length"]
    assert [engine.answers[name] for name in names] == [[GOOD] * 3, [], [], [GOOD] * 3]
    reason = "image 1 of the prompt could not be encoded: backend 'onnxrt' on grids 1x6x6 failed with OSError"
    assert engine.reasons[names[1]].startswith(reason)
    assert engine.reasons[names[2]].startswith("image 2 of the prompt could not be encoded")
    assert "DRM_IOCTL failed" in engine.reasons[names[1]]


def test_others_decode_while_an_image_is_encoded(engine, pipelined):
    _, gate = pipelined
    gate.shut()
    waits = engine.add([3], 3)
    decodes = engine.add([], 6)
    while decodes not in engine.endings:
        engine.step()
    assert engine.answers[waits] == []
    gate.let_in()
    engine.drain()
    assert engine.answers[waits] == [GOOD] * 3


def test_an_aborted_request_takes_its_queued_image_along(engine, pipelined):
    scheduler, gate = pipelined
    service = scheduler.ec_connector._service
    gate.shut()
    engine.add([0], 3)
    wait_until(lambda: engine.step() or gate.inside)
    before = len(gate.calls)
    dropped = engine.add([1], 3)
    shared = [engine.add([2], 3), engine.add([2], 3)]
    wait_until(lambda: engine.step() or service.counters.waiting == 2)
    engine.abort(dropped)
    engine.abort(shared[0])
    assert service.counters.waiting == 1
    gate.let_in()
    engine.drain()
    assert engine.answers[shared[1]] == [GOOD] * 3
    assert len(gate.calls) == before + 1
    assert_nothing_is_left(scheduler.ec_connector)


def test_what_the_encoder_cache_evicted_is_encoded_again_by_the_service(engine, pipelined):
    scheduler, gate = pipelined
    service = scheduler.ec_connector._service
    evicted, before = service.cache.evicted, len(gate.calls)
    for _ in range(2):  # four images go round in a cache for three, and the service keeps two
        for image in range(IMAGES):
            name = engine.add([image], 3 + image)
            engine.drain()
            assert engine.answers[name] == [GOOD] * 3
        assert scheduler.reset_prefix_cache()
    assert len(gate.calls) > before + IMAGES
    assert service.cache.evicted > evicted
    assert engine.worker.encoded == 0


def test_what_a_request_has_read_is_not_held_while_it_decodes(engine, pipelined):
    scheduler, _ = pipelined
    pending = scheduler.ec_connector._pending_images
    first = engine.add([0, 1], 3)
    engine.drain()
    # Image 0 is in vLLM's cache, and may be evicted for image 2: so both are requested.
    scheduler.reset_prefix_cache()
    second = engine.add([0, 2], 3)
    wait_until(lambda: engine.step() or engine.answers[second])
    assert (len(pending._pending), pending.held) == (0, 0)
    assert pending.requests() == []
    engine.drain()
    assert engine.answers[first] == engine.answers[second] == [GOOD] * 3


def test_an_identifier_of_two_images_fails_the_second_alone(engine, pipelined):
    scheduler, gate = pipelined
    gate.shut()
    first = engine.add([0], 3)
    other = engine.add([0], 3)
    scheduler.requests[other].mm_features[0].data["image_grid_thw"].data[:] = torch.tensor([1, 4, 9])
    for _ in range(3):
        engine.step()
    gate.let_in()
    engine.drain()
    assert engine.endings == {first: "length", other: "error"}
    assert "belongs to an image of grid 1x6x6" in engine.reasons[other]


def test_what_the_connector_cannot_see_is_encoded_in_line(engine, pipelined, caplog):
    scheduler, _ = pipelined
    blind = engine.add([0, 1], 3)
    for feature in scheduler.requests[blind].mm_features[:1]:
        object.__setattr__(feature, "data", None)
    engine.drain()
    assert engine.answers[blind] == [GOOD] * 3
    assert engine.worker.encoded == 1


def test_sound_is_left_to_the_language_models_process_without_a_word(engine, pipelined, caplog):
    scheduler, _ = pipelined
    before = scheduler.ec_connector._inline
    name = engine.add([0, 1], 3)
    sound = scheduler.requests[name].mm_features[0]
    object.__setattr__(sound, "modality", "audio")
    object.__setattr__(sound, "data", {"input_audio_features": sound.data["pixel_values"]})
    engine.drain()
    assert engine.answers[name] == [GOOD] * 3
    assert engine.worker.encoded == 1
    assert scheduler.ec_connector._inline == before
    assert "is encoded in the engine's step" not in caplog.text


def test_without_this_packages_scheduler_the_race_for_an_evicted_output_ends_in_line(digits, exact):
    scheduler, _ = make_pipelined("sync", digits, CACHE_SIZE=0)
    connector = scheduler.ec_connector
    connector.holders = connector._guessed_holders  # as with a scheduler of the user's own
    engine = PipelinedEngine(scheduler, exact)
    for images in ([0], [1], [2]):
        engine.add(images, 3)
        engine.drain()
    scheduler.reset_prefix_cache()
    names = [engine.add([3], 3)]
    engine.step()
    wait_until(lambda: connector.has_cache_item("image3"))
    # One step admits both: the first evicts image 0, which the second was just told is there.
    names.append(engine.add([0], 3))
    engine.drain()
    assert all(engine.answers[name] == [GOOD] * 3 for name in names)
    assert engine.worker.encoded == 1
    scheduler.shutdown()


def test_a_full_queue_and_a_full_house_hold_requests_back_in_order(digits, exact):
    scheduler, gate = make_pipelined("sync", digits, CACHE_SIZE=0, QUEUE_SIZE=1)
    service, pending = scheduler.ec_connector._service, scheduler.ec_connector._pending_images
    engine = PipelinedEngine(scheduler, exact)
    gate.shut()
    names = [engine.add([image], 3) for image in range(IMAGES)]
    wait_until(lambda: engine.step() or gate.inside)
    for _ in range(20):
        engine.step()
    assert service.counters.submitted <= 2
    assert pending.held <= 2 * exact[0].nbytes
    gate.let_in()
    engine.drain()
    assert [engine.endings[name] for name in names] == ["length"] * IMAGES
    assert list(engine.endings) == names, "first come, first served"
    scheduler.shutdown()


@pytest.fixture(scope="module")
def retrained(digits, tmp_path_factory):
    """The digits checkpoint with other vision weights, and each image's embedding by them."""
    folder = Path(shutil.copytree(digits, tmp_path_factory.mktemp("retrained") / "checkpoint"))
    rewrite_weights(folder)
    with open_encoder(folder, backend="onnxrt") as encoder:
        return folder, [encoder.encode(pixels(image), [GRID]) for image in range(IMAGES)]


def rewrite_weights(folder):
    """Change the vision weights of a checkpoint in one file."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.startswith("visual.") and name.endswith("down_proj.weight"):
            weights[name] = weight * np.float32(1.5)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_after_new_weights_no_step_uses_the_encoder_before(digits, exact, retrained, kind):
    folder, exact_anew = retrained
    scheduler, _ = make_pipelined(kind, digits)
    engine = PipelinedEngine(scheduler, exact)

    def report(order):  # as a worker does between two steps
        scheduler._orders.append(order)

    def answers(*requests):
        names = [engine.add(images, 3) for images in requests]
        engine.drain()
        return [engine.answers[name] if engine.endings[name] == "length" else engine.reasons[name] for name in names]

    assert answers([0], [1, 0]) == [[GOOD] * 3] * 2
    assert not np.allclose(exact[0], exact_anew[0], atol=1e-3)
    report(Replacement(str(folder), None, source_digest(open_tower(folder))))
    engine.worker.exact = exact_anew
    assert answers([0], [1, 0], []) == [[GOOD] * 3] * 3

    report(Replacement(str(folder), None, "", "no files hold the weights."))
    (image, text) = answers([0], [])
    assert image == "image 1 of the prompt could not be encoded: no files hold the weights."
    assert text == [GOOD] * 3

    report(Replacement(str(digits), None, "sha256:" + 64 * "0"))
    assert "changed while they were loaded" in answers([1])[0]

    def fail(*_, **__):
        raise RuntimeError("no context on this device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionaccel.integrations.vllm.connector.open_wanted_service", fail)
        report(Replacement(str(digits), None, source_digest(open_tower(digits))))
        (image, text) = answers([2], [])
    assert "opening the encoder from the new weights failed with RuntimeError: no context on this device" in image
    assert text == [GOOD] * 3

    report(Replacement(str(digits), None, source_digest(open_tower(digits))))
    engine.worker.exact = exact
    assert answers([0], [2]) == [[GOOD] * 3] * 2
    assert engine.worker.encoded == 0
    scheduler.shutdown()


def test_without_the_plug_in_the_connector_refuses_to_encode(digits, monkeypatch):
    served_model = engine_config.served_model

    def elsewhere(config):  # the process that made the configuration had the plug-in; the one of the connector has not
        served = served_model(config)
        return served if config.ec_transfer_config is None else replace(served, replaces=None)

    monkeypatch.setattr(engine_config, "served_model", elsewhere)
    with pytest.raises(ConfigurationError, match="plug-in is not active"):
        make_pipelined("sync", digits)


@pytest.mark.parametrize(
    ("settings", "config", "mode", "reason"),
    [
        ({}, {}, "pipelined", "nothing prevents it"),
        ({"MODE": "inline"}, {}, "inline", "VISIONACCEL_MODE=inline"),
        ({"MODE": "pipelined"}, {}, "pipelined", "VISIONACCEL_MODE=pipelined"),
        ({}, {"connector": "VisionAccelConnector"}, "pipelined", "--ec-transfer-config names VisionAccelConnector"),
        (
            {},
            {"connector": "ECExampleConnector"},
            "inline",
            "a different EC connector is configured (ECExampleConnector)",
        ),
        ({}, {"cache": "shm"}, "inline", "--mm-processor-cache-type shm"),
        ({}, {"backend": "ray"}, "inline", "it has not been tested with Ray"),
        ({}, {"release": "0.27.1"}, "pipelined", "nothing prevents it"),
        ({}, {"release": "0.99.0"}, "pipelined", "nothing prevents it"),
        ({}, {"old": True, "scheduler": "their.own"}, "inline", "only be ended by this package's scheduler"),
        ({}, {"old": True}, "pipelined", "nothing prevents it"),
        ({}, {"scheduler": "their.own"}, "pipelined", "nothing prevents it"),
        ({}, {"runner": "pooling"}, "pipelined", "nothing prevents it"),
        ({}, {"runner": "pooling", "scheduler": "their.own"}, "inline", "a pooling request whose image failed"),
        ({}, {"pruning": 0.5}, "inline", "--video-pruning-rate"),
        ({"DEVICE": "cuda:1"}, {"device": "cuda"}, "inline", "cuda:1 belongs to the language model"),
        ({"DEVICE": "npu"}, {"device": "cuda"}, "pipelined", "nothing prevents it"),
    ],
)
def test_the_mode_is_chosen_for_a_reason(digits, monkeypatch, settings, config, mode, reason):
    choice = choose_mode(*configured(digits, monkeypatch, settings, config))
    assert choice.mode == mode
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("settings", "config", "message"),
    [
        ({"MODE": "pipelined"}, {"connector": "ECExampleConnector"}, "a different EC connector"),
        ({}, {"connector": "VisionAccelConnector", "role": "ec_both"}, "its ec_role is ec_consumer"),
        ({}, {"connector": "VisionAccelConnector", "pruning": 0.5}, "--video-pruning-rate"),
        (
            {},
            {"connector": "VisionAccelConnector", "old": True, "scheduler": "their.own"},
            "only be ended by this package's scheduler",
        ),
        ({"MODE": "inline"}, {"connector": "VisionAccelConnector"}, "--ec-transfer-config names VisionAccelConnector"),
    ],
)
def test_a_mode_that_cannot_be_had_is_refused(digits, monkeypatch, settings, config, message):
    with pytest.raises(ConfigurationError, match=message):
        choose_mode(*configured(digits, monkeypatch, settings, config))


def configured(checkpoint, monkeypatch, settings, config):
    """A real engine configuration, changed where the test says so, and the settings."""
    import vllm
    from vllm.config import ECTransferConfig
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase
    from vllm.engine.arg_utils import EngineArgs

    runner = config.get("runner", "auto")
    made = EngineArgs(model=str(checkpoint), dtype="float32", max_model_len=160, runner=runner).create_engine_config()
    made.ec_transfer_config = None
    made.scheduler_config.scheduler_cls = config.get("scheduler")
    if "connector" in config:
        made.ec_transfer_config = ECTransferConfig(
            ec_connector=config["connector"], ec_role=config.get("role", "ec_consumer")
        )
    if "cache" in config:
        made.model_config.multimodal_config.mm_processor_cache_type = config["cache"]
    if "pruning" in config:
        made.model_config.multimodal_config.video_pruning_rate = config["pruning"]
    if "backend" in config:
        made.parallel_config.distributed_executor_backend = config["backend"]
    if "device" in config:
        made.device_config.device = config["device"]
    if "release" in config:
        monkeypatch.setattr(vllm, "__version__", config["release"])
    if "old" in config:  # as in 0.28 and 0.29
        monkeypatch.delattr(ECConnectorBase, "take_unavailable_requests")
    monkeypatch.setattr(self_test, "problem", lambda **_: None)  # it has tests of its own
    for name, value in settings.items():
        monkeypatch.setenv("VISIONACCEL_" + name, value)
    return made, load_settings()


def test_embeddings_arrive_in_a_worker_as_they_left(digits, exact, monkeypatch):
    from visionaccel.integrations.vllm.connector import EmbeddingsForStep, VisionAccelConnector

    rows = exact[1].astype(ml_dtypes.bfloat16)
    rows.flags.writeable = False
    step = EmbeddingsForStep({"image1": rows.view(np.uint16)})
    beside = []
    with io.BytesIO() as stream:
        Pickler(stream, protocol=5, buffer_callback=beside.append).dump(step)
        inside = stream.getvalue()
    assert len(inside) < 600, "the numbers travel beside the pickled step"
    assert [isinstance(each, PickleBuffer) for each in beside] == [True]
    arrived = loads(inside, buffers=[bytes(each.raw()) for each in beside])

    connector = object.__new__(VisionAccelConnector)
    connector._connector_metadata, connector._dtype, connector._device = arrived, torch.bfloat16, "cpu"
    cache = {"image0": torch.ones(1)}
    connector.start_load_caches(cache)
    assert cache["image1"].dtype == torch.bfloat16
    np.testing.assert_array_equal(cache["image1"].float().numpy(), rows.astype(np.float32))
    cache["image1"][0] = 0  # the worker's own


def test_embeddings_of_a_distrusted_device_are_encoded_anew(engine, pipelined, exact):
    scheduler, gate = pipelined
    connector = scheduler.ec_connector
    spoilt = [True]

    class Lying(Session):
        """Answers wrongly, and nothing about it looks wrong."""

        @property
        def capabilities(self):
            return gate.capabilities

        def run(self, inputs):
            rows = dict(gate.run(inputs))
            return {name: -value for name, value in rows.items()} if spoilt[0] else rows

        def close(self):
            gate.close()

    opened = connector._service.encoders[0].primary.programs[0]
    opened.session = Lying()
    try:
        first = engine.add([0, 1], 3)
        while not engine.answers[first]:
            engine.step()
        assert engine.answers[first][0] == TAINTED, "nobody could know"
        spoilt[0] = False
        connector._service.encoders[0].links[0].distrust("its canary failed")
        again = [engine.add([image], 3) for image in range(IMAGES)]
        wait_until(lambda: connector._service.encoders[0].links[0].breaker.closed)
        engine.drain()
    finally:
        opened.session = gate
    for name in again:  # at once, or with an error while the device was disabled
        assert (engine.answers[name], engine.endings[name]) in (([GOOD] * 3, "length"), ([], "error"))
    third = [engine.add([image], 3) for image in range(IMAGES)]
    engine.drain()
    assert all(engine.answers[name] == [GOOD] * 3 for name in third)
    assert_nothing_is_left(connector)


def test_what_was_being_encoded_when_a_device_was_distrusted_is_asked_for_again():
    futures = []
    service = SimpleNamespace(submit=lambda *_, **__: futures.append(Future()) or futures[-1], bytes_of=lambda _: 36)
    pending = PendingImages(service, 1000)
    item = WantedItem("image0", "image 1", pixels(0), GRID)

    def ready(request):
        return pending.ready(request, [item], 0.0, urgent=False)

    assert not ready("a")
    assert not ready("b")
    pending.forget_done()
    futures[0].set_result(np.zeros((9, 4)))  # computed before, and handed over after
    assert pending.get("image0") is None
    assert not ready("a")
    assert not ready("b")
    right = np.ones((9, 4))
    futures[1].set_result(right)
    assert ready("a")
    assert ready("b")
    assert pending.get("image0") is right
    assert (len(futures), pending.held) == (2, 36)
    pending.release("a")
    pending.release("b")
    assert (pending.held, pending.requests()) == (0, [])


def test_refused_images_are_not_kept_once_their_requests_have_ended():
    pending, kept = PendingImages(SimpleNamespace(), 0, ConfigurationError("no encoder has these weights.")), []
    for name in ("a", "b"):
        item = WantedItem(name, "image 1", pixels(0), GRID)
        kept.append(weakref.ref(item.patches))
        assert not pending.ready(name, [item], 0.0, urgent=False)
        assert list(pending.failures()) == [name]
        pending.release(name)
    gc.collect()
    assert kept[0]() is None


def test_vllms_factory_finds_it_where_the_configuration_names_it():
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory

    from visionaccel.integrations.vllm.connector import VisionAccelConnector

    named = SimpleNamespace(
        ec_connector=engine_config.CONNECTOR, ec_connector_module_path="visionaccel.integrations.vllm.connector"
    )
    assert named.ec_connector_module_path == engine_config._CONNECTOR_MODULE
    assert ECConnectorFactory.get_connector_class(named) is VisionAccelConnector
