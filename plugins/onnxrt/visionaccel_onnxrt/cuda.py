"""What the CUDA driver says of a GPU, without torch."""

import ctypes
import sys

__all__ = ["gpu_model"]

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
