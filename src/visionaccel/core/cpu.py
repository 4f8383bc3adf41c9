"""The name of this machine's CPU, its instruction sets, and whether it computes in bfloat16."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

_INFO = Path("/proc/cpuinfo")
_FIELDS = ("flags", "Features")
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Linux's names of the instructions that multiply bfloat16, on x86 and Arm."""

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def flags_in(cpuinfo: str) -> frozenset[str]:
    """Return the names of the instruction sets that the text of a `/proc/cpuinfo` lists."""
    listed = {line.partition(":")[2] for line in cpuinfo.splitlines() if line.split(":")[0].strip() in _FIELDS}
    return frozenset(" ".join(listed).split())


def has_bfloat16() -> bool:
    """Return whether the CPU has instructions for products of bfloat16, and `ONEDNN_MAX_CPU_ISA` allows them.

    torch and oneDNN also report support on CPUs where they convert it to float32, which is slower.
    """
    limit = next((os.environ[name] for name in _LIMITS if os.environ.get(name)), "")
    return limit.upper() not in _WITHOUT_BFLOAT16 and not flags_in(_cpuinfo()).isdisjoint(_BFLOAT16)


def processor_name() -> str:
    """Return the processor's name as the system reports it."""
    named = (line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


@cache
def _cpuinfo() -> str:
    """Return the system's description of the CPU; empty on a system that has none."""
    try:
        return _INFO.read_text()
    except OSError:
        return ""
