"""The table of dtypes agrees with those whose names it states."""

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save

from visionaccel.core.dtypes import DTYPES, FLOATS, OF_ONNX, OF_SAFETENSORS, safetensors_name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_dtype_is_onnxs_of_that_number(dtype):
    assert np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype.onnx)) == dtype.numpy
    assert OF_ONNX[dtype.onnx] is dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_dtype_is_torchs_of_that_name_and_safetensors_of_that_code(dtype):
    kind = getattr(torch, dtype.name, None)
    if kind is None:
        pytest.skip(f"torch has no {dtype.name}")
    values = torch.zeros(3).to(kind)
    assert f'"dtype":"{dtype.safetensors}"'.encode() in save({"x": values})
    assert values.element_size() == dtype.bytes
    assert OF_SAFETENSORS[dtype.safetensors] is dtype


def test_only_floats_have_plain_names_in_stored_tensors():
    assert [safetensors_name(name) for name in FLOATS] == ["F64", "F32", "F16", "BF16"]
    assert safetensors_name("I64") == "I64"
