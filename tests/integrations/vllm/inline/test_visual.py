"""The module in the place of vLLM's vision tower, where embeddings come from elsewhere."""

import ast
import shutil
import time
from pathlib import Path

import pytest
import torch
import vllm

from served import served_model
from visionaccel.checkpoint import SINGLE_FILE
from visionaccel.errors import BackendUnavailableError, ChangedFileError
from visionaccel.integrations.vllm.compat import worker
from visionaccel.integrations.vllm.inline import visual
from visionaccel_testing.checkpoints import TINY, random_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations
GRIDS = [[1, 4, 4], [1, 6, 4]]


@pytest.fixture
def receiving(tiny, monkeypatch):
    """Makes a tower of an engine that receives its embeddings."""

    def make(source=tiny, **settings):
        for name, value in settings.items():
            monkeypatch.setenv(f"VISIONACCEL_{name}", value)
        served = served_model(source, TINY)
        return visual.AcceleratedTower(served, receives=True)

    return make


class Runner:
    """Calls a tower as vLLM's model runners do."""

    def __init__(self, tower):
        self.tower = tower

    def execute_model(self):
        return self.tower(torch.ones(40, 96), GRIDS)

    def profile_run(self):
        return self.execute_model()


class TheirRunner(Runner):
    """One of vLLM's, whichever platform's."""

    __module__ = "vllm.v1.worker.gpu_model_runner"


class CPURunner(TheirRunner):
    """A platform's of its own."""


def test_vllms_profiling_run_gets_zeros_and_opens_nothing(receiving):
    for kind in (TheirRunner, CPURunner):
        made = receiving(BACKEND="torch_ref")
        assert torch.equal(kind(made).profile_run(), torch.zeros(10, 24))
        assert made._encoder._opening is None


def test_rows_with_deepstack_levels_are_as_wide_as_vllms_and_zeros_too(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONACCEL_BACKEND", "torch_ref")
    monkeypatch.setattr(worker, "worker_connector", lambda: None)
    monkeypatch.setattr(visual, "report_fault", lambda *_: True)
    made = visual.AcceleratedTower(served_model(random_checkpoint(tmp_path, family="qwen3_omni")))
    assert (made.out_hidden_size, len(made.deepstack_visual_indexes)) == (3 * 24, 2), "as vLLM's Qwen3-Omni reads them"
    assert made(torch.ones(40, 96), GRIDS).abs().amax(0).all()
    assert torch.equal(made(torch.full((40, 96), torch.nan), GRIDS), torch.zeros(10, 72))
    receiving = visual.AcceleratedTower(served_model(tmp_path), receives=True)
    assert torch.equal(TheirRunner(receiving).profile_run(), torch.zeros(10, 72))


def test_what_is_opened_late_is_not_opened_from_another_checkpoint(receiving, tiny, tmp_path):
    served = Path(shutil.copytree(tiny, tmp_path / "served"))
    made = receiving(served, BACKEND="torch_ref")
    random_checkpoint(tmp_path / "other", seed=1)
    (tmp_path / "other" / SINGLE_FILE).replace(served / SINGLE_FILE)
    with pytest.raises(ChangedFileError, match="changed after it was verified"):
        made._encoder.result(time.monotonic() + 60)


def test_whatever_is_not_known_to_be_profiling_is_encoded(receiving):
    for call in (lambda tower: TheirRunner(tower).execute_model(), lambda tower: Runner(tower).profile_run()):
        assert call(receiving(BACKEND="torch_ref")).abs().sum() > 0


@pytest.mark.parametrize("module", ["vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"])
def test_vllms_runners_encode_dummies_in_the_profiling_run(module):
    source = Path(vllm.__path__[0], *module.split(".")[1:]).with_suffix(".py").read_text()
    (runner,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "GPUModelRunner")
    (method,) = (n for n in runner.body if isinstance(n, ast.FunctionDef) and n.name == "profile_run")
    assert "embed_multimodal" in ast.unparse(method) or "profile_encoder_cache" in ast.unparse(method)


def test_a_step_that_needs_the_encoder_opens_it(receiving):
    made = receiving(BACKEND="torch_ref")
    rows = made(torch.ones(40, 96), GRIDS)
    assert rows.shape == (10, 24)
    assert rows.abs().sum() > 0
    opened = made._encoder.result(time.monotonic())
    made(torch.ones(40, 96), GRIDS)
    assert made._encoder.result(time.monotonic()) is opened, "once"


def test_an_encoder_that_cannot_be_opened_is_the_items_fault_and_is_not_tried_again_at_once(receiving, monkeypatch):
    faults = []
    monkeypatch.setattr(worker, "worker_connector", lambda: None)
    monkeypatch.setattr(visual, "report_fault", lambda fault, _: faults.append(fault) or True)
    made = receiving(BACKEND="onnxrt", DEVICE="npu")
    for _ in range(2):
        assert torch.equal(made(torch.ones(40, 96), GRIDS), torch.zeros(10, 24))
    assert len(faults) == 4
    assert len({fault.key for fault in faults}) == 2
    assert "VitisAIExecutionProvider" in faults[0].message
    monkeypatch.setattr(visual, "report_fault", lambda *_: False)
    with pytest.raises(BackendUnavailableError):
        made(torch.ones(40, 96), GRIDS)
