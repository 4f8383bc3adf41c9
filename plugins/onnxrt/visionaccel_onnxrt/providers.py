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
        source: What to install to get it.
        static_only: Whether it runs programs of fixed shapes only.
        indexed: Whether there may be several such devices, `cuda:0`, `cuda:1`, ...
        options: Provider options that it needs to compute in the declared precision.
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
        "onnxruntime-gpu instead of onnxruntime (pip install onnxruntime-gpu)",
        indexed=True,
        options={"use_tf32": "0"},  # otherwise float32 products are rounded to 10 bits on Ampere and later
    ),
    "npu": Provider(
        VITISAI_PROVIDER,
        100,
        "the ONNX Runtime of AMD's Ryzen AI Software; PyPI's has none",
        static_only=True,
    ),
}
"""The provider of each kind of device."""


def provider_for(device: str | None) -> tuple[Provider, dict[str, str]] | None:
    """Return the provider and its options for a device such as `cuda:1`, by default the CPU; None if it is unknown."""
    kind, colon, index = (device or "cpu").partition(":")
    provider = DEVICES.get(kind)
    if provider is None or (colon and not (provider.indexed and index.isdigit())):
        return None
    return provider, {**provider.options, **({"device_id": index} if index else {})}


_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_LONGEST = 256


def gpu_model(index: int) -> str:
    """Return the model of a GPU, such as `NVIDIA H200`; empty if the driver does not report it.

    Args:
        index: Its number in this process; `CUDA_VISIBLE_DEVICES` may renumber GPUs.
    """
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        return ""
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_LONGEST)
    failed = (
        driver.cuInit(0)  # ONNX Runtime has done this; a second call changes nothing
        or driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, _LONGEST, device)
    )
    return "" if failed else name.value.decode(errors="replace")
