"""Which execution provider serves a device, and where to get it."""

from dataclasses import dataclass

__all__ = ["CPU_PROVIDER", "DEVICES", "Provider", "provider_for"]

CPU_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: Its name in ONNX Runtime.
        score: How good a choice it is (see `visionaccel.backends.Accepted`).
        source: What to install to have it.
        static_only: It takes programs of fixed shapes only.
    """

    name: str
    score: int
    source: str
    static_only: bool = False


DEVICES = {
    "cpu": Provider(CPU_PROVIDER, 50, "onnxruntime (pip install onnxruntime)"),
    "cuda": Provider(
        "CUDAExecutionProvider", 80, "onnxruntime-gpu in the place of onnxruntime (pip install onnxruntime-gpu)"
    ),
    "npu": Provider(
        "VitisAIExecutionProvider",
        100,
        "the ONNX Runtime of AMD's Ryzen AI Software; PyPI's has none",
        static_only=True,
    ),
}
"""Provider of each kind of device."""


def provider_for(device: str | None) -> tuple[Provider | None, dict[str, str]]:
    """Provider of a device such as `cpu`, `cuda:1` or `npu` (None: the CPU) and its options; None if there is none."""
    kind, _, index = (device or "cpu").partition(":")
    provider = DEVICES.get(kind.lower())
    return provider, {"device_id": index} if index and provider else {}
