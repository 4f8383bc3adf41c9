"""The module in the place of vLLM's vision tower, where embeddings come from elsewhere."""

import pytest
import torch

from visionaccel.errors import BackendUnavailableError
from visionaccel.integrations.vllm import compat, tower
from visionaccel.testing.checkpoints import TINY

GRIDS = [[1, 4, 4], [1, 6, 4]]


@pytest.fixture
def receiving(tiny, monkeypatch):
    """Makes a tower of an engine that receives its embeddings."""

    def make(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(f"VISIONACCEL_{name}", value)
        served = compat.ServedModel(
            source=str(tiny),
            revision=None,
            architectures=("Qwen2_5_VLForConditionalGeneration",),
            replaces="Qwen2_5_VLForConditionalGeneration",
            multimodal=True,
            takes_media=True,
            own_implementation=True,
            dtype=torch.float32,
            device="cpu",
            vision=TINY,
        )
        return tower.AcceleratedTower(served, receives=True)

    return make


def test_dummy_runs_get_zeros_and_open_nothing(receiving, monkeypatch):
    monkeypatch.setattr(compat, "in_step", lambda: False)
    made = receiving(BACKEND="torch_ref")
    assert torch.equal(made(torch.ones(40, 96), GRIDS), torch.zeros(10, 24))
    assert made._encoder is None


def test_a_step_that_needs_the_encoder_opens_it(receiving, monkeypatch):
    monkeypatch.setattr(compat, "in_step", lambda: True)
    made = receiving(BACKEND="torch_ref")
    rows = made(torch.ones(40, 96), GRIDS)
    assert rows.shape == (10, 24)
    assert rows.abs().sum() > 0
    assert made.encoder is made.encoder


def test_an_encoder_that_cannot_be_opened_is_the_items_fault_and_is_not_tried_again_at_once(receiving, monkeypatch):
    faults = []
    monkeypatch.setattr(compat, "in_step", lambda: True)
    monkeypatch.setattr(compat, "worker_connector", lambda: None)
    monkeypatch.setattr(tower, "report_fault", lambda fault: faults.append(fault) or True)
    made = receiving(BACKEND="onnxrt", DEVICE="npu")
    for _ in range(2):
        assert torch.equal(made(torch.ones(40, 96), GRIDS), torch.zeros(10, 24))
    assert len(faults) == 4
    assert len({fault.key for fault in faults}) == 2
    assert "VitisAIExecutionProvider" in faults[0].message
    monkeypatch.setattr(tower, "report_fault", lambda fault: False)
    with pytest.raises(BackendUnavailableError):
        made(torch.ones(40, 96), GRIDS)
