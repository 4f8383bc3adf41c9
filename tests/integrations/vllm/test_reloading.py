"""Weights of the vision encoder that vLLM is given after the start have their effect, or are refused."""

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from served import served_model
from visionaccel import open_encoder
from visionaccel.bundle import strip_checkpoint
from visionaccel.checkpoint import Checkpoint
from visionaccel.encoder import open_tower, source_digest
from visionaccel.errors import ConfigurationError, DeviceError
from visionaccel.integrations.vllm.compat import worker
from visionaccel.integrations.vllm.encoder_source import Replacement, StoredWeights
from visionaccel.integrations.vllm.inline import visual
from visionaccel.integrations.vllm.shared_memory import REPLACED
from visionaccel_testing.checkpoints import TINY, random_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations
GRIDS = [[1, 4, 4], [1, 6, 4]]
PATCHES = torch.linspace(-1, 1, 40 * 96).reshape(40, 96)


class Engine:
    """A served model's tower, and what vLLM does to it."""

    def __init__(self, folder, faults, *, receives=False):
        self.faults = faults
        self.served = served_model(folder, TINY)
        self.tower = visual.AcceleratedTower(self.served, receives=receives)

    def load(self, weights, folder=None):
        """vLLM is given weights, of a folder if it names one."""
        if folder is not None:
            self.served = replace(self.served, source=str(folder))
        comparison = self.tower.compare(lambda: self.served)
        for name, weight in weights.items():
            comparison.note(name, weight if isinstance(weight, torch.Tensor) else torch.from_numpy(weight))
        self.tower.settle(comparison, self.served)

    @property
    def orders(self):
        """What the engine's process was told."""
        return [Replacement.loads(fault.message) for fault in self.faults if fault.key == REPLACED]


@pytest.fixture
def faults(monkeypatch):
    """What workers report."""
    found = []
    monkeypatch.setattr(visual, "report_fault", lambda fault, _: found.append(fault) or True)
    monkeypatch.setattr(worker, "worker_connector", lambda: None)
    monkeypatch.setenv("VISIONACCEL_BACKEND", "torch_ref")
    return found


@pytest.fixture
def engine(tiny, faults):
    return Engine(tiny, faults)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint of the same shapes with other weights."""
    return random_checkpoint(tmp_path_factory.mktemp("other"), seed=7)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def stripped(folder, into):
    """A copy of a checkpoint with a language model's tensor and without its vision weights."""
    whole = Path(shutil.copytree(folder, into / f"{Path(folder).name}-whole"))
    save_file(weights(folder) | {"model.norm.weight": np.ones(4, np.float32)}, whole / "model.safetensors")
    return strip_checkpoint(Checkpoint(whole), into / Path(folder).name).folder


def expected(folder):
    with open_encoder(folder, backend="torch_ref") as encoder:
        return torch.from_numpy(encoder.encode(PATCHES.numpy(), GRIDS))


def test_weights_that_equal_those_in_use_change_nothing(engine, tiny):
    engine.load(weights(tiny))
    engine.load({name: torch.from_numpy(weight).double() for name, weight in weights(tiny).items()})
    engine.load({"visual.patch_embed.proj.weight": weights(tiny)["visual.patch_embed.proj.weight"]})
    engine.load({})
    assert engine.orders == []
    assert torch.allclose(engine.tower(PATCHES, GRIDS), expected(tiny), atol=1e-5)


def test_weights_in_files_are_used_from_then_on(engine, tiny, other):
    before = engine.tower(PATCHES, GRIDS)
    engine.load(weights(other), other)
    assert torch.allclose(engine.tower(PATCHES, GRIDS), expected(other), atol=1e-5)
    assert not torch.allclose(engine.tower(PATCHES, GRIDS), before, atol=1e-2)
    assert engine.orders == [Replacement(str(other), None, source_digest(open_tower(other)))]
    engine.load(weights(tiny), tiny)
    assert torch.allclose(engine.tower(PATCHES, GRIDS), before, atol=1e-5)


def test_files_that_were_rewritten_in_place_are_used_from_then_on(tiny, other, faults, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    engine = Engine(folder, faults)
    save_file(weights(other), folder / "model.safetensors")
    engine.load(weights(folder))
    assert torch.allclose(engine.tower(PATCHES, GRIDS), expected(other), atol=1e-5)


def test_files_that_changed_before_their_weights_were_noted_are_not_taken_to_be_those_in_use(tiny, other, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    tower = open_tower(folder)
    assert tower.weights
    assert StoredWeights(tower, ("visual.",)).unchanged()
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
    assert not StoredWeights(tower, ("visual.",)).unchanged()


def test_files_that_go_away_during_an_update_end_it_after_its_last_tensor(tiny, faults, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    engine = Engine(folder, faults)
    comparison = engine.tower.compare(lambda: engine.served)
    (folder / "model.safetensors").unlink()
    for name, weight in weights(tiny).items():
        comparison.note(name, torch.from_numpy(weight))
    with pytest.raises(ConfigurationError, match="was given new weights for the vision encoder"):
        engine.tower.settle(comparison, engine.served)


@pytest.mark.parametrize("receives", [False, True], ids=["in-line", "pipelined"])
def test_weights_without_files_are_refused_and_nothing_is_encoded_with_the_ones_before(tiny, other, faults, receives):
    engine = Engine(tiny, faults, receives=receives)
    with pytest.raises(ConfigurationError, match="was given new weights for the vision encoder") as caught:
        engine.load(weights(other))
    assert "call reload_weights with its weights_path" in caught.value.hint
    assert [order.refusal for order in engine.orders] == [caught.value.message]
    assert torch.equal(engine.tower(PATCHES, GRIDS), torch.zeros(10, 24)), "each item is reported as not encoded"
    assert len(faults) == 1 + len(GRIDS)
    engine.load({})  # of the language model alone
    with pytest.raises(ConfigurationError):
        engine.load({"visual.patch_embed.proj.weight": weights(tiny)["visual.patch_embed.proj.weight"]})
    engine.load(weights(tiny), tiny)
    assert torch.allclose(engine.tower(PATCHES, GRIDS), expected(tiny), atol=1e-5)


def test_refused_weights_keep_no_images_of_the_requests_that_they_fail(engine, other):
    with pytest.raises(ConfigurationError):
        engine.load(weights(other))
    pixels = PATCHES.clone()
    engine.tower(pixels, GRIDS)
    kept = weakref.ref(pixels)
    del pixels
    engine.tower(PATCHES, GRIDS)
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("in_files", [False, True], ids=["refused", "taken"])
def test_where_no_scheduler_listens_no_embedding_of_the_weights_before_is_used(
    tiny, other, faults, monkeypatch, in_files
):
    from visionaccel.integrations.vllm.connector import EmbeddingsForStep, VisionAccelConnector

    def step(rows, cache):
        connector._connector_metadata = EmbeddingsForStep(rows)
        connector.start_load_caches(cache)
        return cache

    connector = object.__new__(VisionAccelConnector)
    connector._dtype, connector._device = torch.float32, "cpu"
    monkeypatch.setattr(visual, "report_fault", lambda *_: False)  # as with a scheduler of the user's own
    monkeypatch.setattr(worker, "worker_connector", lambda: connector)
    engine = Engine(tiny, faults, receives=True)
    cached = step({"before": np.ones((4, 24), np.float32)}, {})
    with pytest.raises(ConfigurationError):
        engine.load(weights(other), other if in_files else None)
    assert step({}, cached) == {}, "a request that reads what was cached before ends the step"
    with pytest.raises(ConfigurationError):
        step({"image": np.ones((4, 24), np.float32)}, {})


def test_a_part_of_new_weights_is_refused(engine, other):
    with pytest.raises(ConfigurationError, match="was not given, but has different values there"):
        engine.load({"visual.patch_embed.proj.weight": weights(other)["visual.patch_embed.proj.weight"]}, other)


def test_weights_of_another_shape_or_name_are_refused(engine, tiny):
    with pytest.raises(ConfigurationError):
        engine.load({"visual.patch_embed.proj.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ConfigurationError):
        engine.load({"visual.unknown": np.zeros((2, 2), np.float32)})


def test_a_bundle_of_the_weights_before_is_not_used_with_new_ones(tiny, other, faults, monkeypatch):
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(tiny))
    engine = Engine(tiny, faults)
    with pytest.raises(ConfigurationError, match="made from different vision weights"):
        engine.load(weights(other), other)
    assert engine.orders[-1].refusal is not None


def test_a_stripped_checkpoint_of_the_weights_in_use_changes_nothing(engine, tiny, tmp_path):
    engine.load({}, stripped(tiny, tmp_path))
    assert engine.orders == []
    assert torch.allclose(engine.tower(PATCHES, GRIDS), expected(tiny), atol=1e-5)


def test_a_checkpoint_that_was_stripped_of_other_weights_is_refused(engine, tiny, other, tmp_path):
    with pytest.raises(ConfigurationError, match="are not those of the vision encoder") as caught:
        engine.load({}, stripped(other, tmp_path))
    assert [order.refusal for order in engine.orders] == [caught.value.message]
    assert torch.equal(engine.tower(PATCHES, GRIDS), torch.zeros(10, 24))
    engine.load(weights(tiny), tiny)
    assert torch.allclose(engine.tower(PATCHES, GRIDS), expected(tiny), atol=1e-5)


def test_a_stripped_checkpoint_gets_the_bundle_of_its_weights_again(tiny, other, faults, tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(other))
    folder = stripped(other, tmp_path)
    engine = Engine(folder, faults)
    with pytest.raises(ConfigurationError, match="made from different vision weights"):
        engine.load({}, stripped(tiny, tmp_path))
    assert torch.equal(engine.tower(PATCHES, GRIDS), torch.zeros(10, 24))
    engine.load({}, folder)
    assert engine.orders[-1].digest == source_digest(open_tower(other))
    assert torch.allclose(engine.tower(PATCHES, GRIDS), expected(other), atol=1e-5)


@pytest.mark.parametrize(
    "error", [DeviceError("out of memory"), RuntimeError("out of memory")], ids=["ours", "a-vendors"]
)
def test_an_encoder_that_cannot_be_opened_again_encodes_nothing(engine, other, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(visual, "open_guarded", fail)
    with pytest.raises(DeviceError, match="out of memory"):
        engine.load(weights(other), other)
    assert torch.equal(engine.tower(PATCHES, GRIDS), torch.zeros(10, 24))
    assert engine.orders[-1].refusal.endswith("out of memory")
