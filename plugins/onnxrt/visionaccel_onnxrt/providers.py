"""Which execution provider serves a device, and where to get it."""

import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
VITISAI_PROVIDER = "VitisAIExecutionProvider"


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        name: Its name in ONNX Runtime.
        score: How good a choice it is (see `visionaccel.backends.Accepted`).
        source: What to install to have it.
        static_only: It takes programs of fixed shapes only.
        indexed: There may be several such devices, `cuda:0`, `cuda:1`, ...
        options: Provider options that it needs to compute what it says.
    """

    name: str
    score: int
    source: str
    static_only: bool = False
    indexed: bool = False
    options: Mapping[str, str] = field(default_factory=dict)


DEVICES = {
    "cpu": Provider(CPU_PROVIDER, 50, "onnxruntime (pip install onnxruntime)"),
    "cuda": Provider(
        CUDA_PROVIDER,
        80,
        "onnxruntime-gpu in the place of onnxruntime (pip install onnxruntime-gpu)",
        indexed=True,
        options={"use_tf32": "0"},  # else float32 products are rounded to 10 bits on Ampere and later
    ),
    "npu": Provider(
        VITISAI_PROVIDER,
        100,
        "the ONNX Runtime of AMD's Ryzen AI Software; PyPI's has none",
        static_only=True,
    ),
}
"""Provider of each kind of device."""


def provider_for(device: str | None) -> tuple[Provider, dict[str, str]] | None:
    """Provider of a device such as `cpu`, `cuda:1` or `npu` (None: the CPU) with its options; None if there is none."""
    kind, colon, index = (device or "cpu").partition(":")
    provider = DEVICES.get(kind)
    if provider is None or (colon and not (provider.indexed and index.isdigit())):
        return None
    return provider, {**provider.options, **({"device_id": index} if index else {})}


_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_LONGEST = 256


def gpu_model(index: int) -> str:
    """The model of a GPU, such as `NVIDIA H200`; empty if the driver does not say.

    Args:
        index: Its number as this process counts GPUs, which `CUDA_VISIBLE_DEVICES` may have renumbered.
    """
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return ""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_LONGEST)
    failed = (
        driver.cuInit(0)  # which ONNX Runtime has done; again it changes nothing
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, _LONGEST, device)
    )
    return "" if failed else name.value.decode(errors="replace")
