"""CUDA devices: the GPU that a session says it runs on. The driver is a stand-in, with GPUs of two models."""

import ctypes
from pathlib import Path

import onnxruntime
import pytest
from onnx import parser

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.program import ONNX, Program
from visionaccel_onnxrt import OnnxRuntimeBackend
from visionaccel_onnxrt.backend import OnnxRuntimeOptions
from visionaccel_onnxrt.providers import gpu_model

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
MODELS = (b"NVIDIA H200", b"NVIDIA L4")
GRAPH = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 4] x) => (float[2, 4] out) { out = Softmax(x) }"""


class Driver:
    """Answers as libcuda does: zero for success."""

    def __init__(self, _):
        pass

    def cuInit(self, _):  # noqa: N802 - the driver's names
        return 0

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = index
        return 0 if index < len(MODELS) else 101

    def cuDeviceGetName(self, name, _, device):  # noqa: N802
        name.value = MODELS[device.value]
        return 0


class OnGpu:
    """Stands for a session on a GPU."""

    def __init__(self, *_, **__):
        pass

    def get_providers(self):
        return [CUDA, CPU]


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", Driver)


def opened(monkeypatch, device):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnGpu)
    program = Program(
        name="any",
        family="none",
        format=ONNX,
        folder=Path(),
        inputs=(TensorSpec("x", "float32", (2, 4)),),
        outputs=(TensorSpec("out", "float32", (2, 4)),),
        weights={},
        uniform_frames=True,
        model=parser.parse_model(GRAPH).SerializeToString,
        digest="sha256:1",
    )
    return OnnxRuntimeBackend().open(program, device, OnnxRuntimeOptions())


@pytest.mark.parametrize(
    ("device", "model"), [("cuda", "NVIDIA H200"), ("cuda:0", "NVIDIA H200"), ("cuda:1", "NVIDIA L4")]
)
def test_a_session_on_a_gpu_names_its_model(monkeypatch, driver, device, model):
    assert opened(monkeypatch, device).capabilities.hardware == model


def test_a_gpu_that_the_driver_does_not_know_has_no_model(driver):
    assert gpu_model(len(MODELS)) == ""


def test_without_a_driver_there_is_no_model(monkeypatch):
    def missing(_):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu_model(0) == ""
