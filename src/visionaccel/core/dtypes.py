"""Dtypes of arrays: their names in numpy and safetensors, their numbers in ONNX, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype: its names in numpy and torch and in safetensors, and its number in `onnx.TensorProto.DataType`."""

    name: str
    safetensors: str
    onnx: int
    numpy: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """Size of an element in bytes."""
        return self.numpy.itemsize


_ROWS: tuple[tuple[Any, str, int], ...] = (
    (np.float64, "F64", 11),
    (np.float32, "F32", 1),
    (np.float16, "F16", 10),
    (ml_dtypes.bfloat16, "BF16", 16),
    (ml_dtypes.float8_e4m3fn, "F8_E4M3", 17),
    (ml_dtypes.float8_e5m2, "F8_E5M2", 19),
    (ml_dtypes.float8_e8m0fnu, "F8_E8M0", 24),
    (np.int64, "I64", 7),
    (np.int32, "I32", 6),
    (np.int16, "I16", 5),
    (np.int8, "I8", 3),
    (np.uint64, "U64", 13),
    (np.uint32, "U32", 12),
    (np.uint16, "U16", 4),
    (np.uint8, "U8", 2),
    (np.bool_, "BOOL", 9),
    (np.complex64, "C64", 14),
)
_EACH = tuple(Dtype(np.dtype(kind).name, code, number, np.dtype(kind)) for kind, code, number in _ROWS)

DTYPES: Mapping[str, Dtype] = MappingProxyType({each.name: each for each in _EACH})
"""Every dtype by its name."""

OF_SAFETENSORS: Mapping[str, Dtype] = MappingProxyType({each.safetensors: each for each in _EACH})
"""Every dtype by its name in safetensors files."""

OF_ONNX: Mapping[int, Dtype] = MappingProxyType({each.onnx: each for each in _EACH})
"""Every dtype by its number in ONNX models."""

FLOATS: Mapping[str, Any] = MappingProxyType(
    {name: DTYPES[name].numpy.type for name in ("float64", "float32", "float16", "bfloat16")}
)
"""The floating dtypes that weights may have, as numpy types by their names."""


def safetensors_name(dtype: str) -> str:
    """Return the name in safetensors files of a `StoredTensor.dtype`, such as `BF16` for `bfloat16`."""
    return DTYPES[dtype].safetensors if dtype in FLOATS else dtype
