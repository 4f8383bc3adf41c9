"""What an ONNX tensor says of the place of its data."""

from pathlib import Path

import pytest
from onnx import TensorProto

from visionaccel.core.onnx_graphs import ExternalData, hold_data, is_external, point_at
from visionaccel.core.stored_tensor import StoredTensor

PLACE = ExternalData("weights/a.safetensors", 128, 64)


def external(**fields):
    tensor = TensorProto(name="w", data_location=TensorProto.EXTERNAL)
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_a_place_that_is_stated_is_read_again():
    tensor = TensorProto(name="w", raw_data=b"")
    assert not is_external(tensor)
    point_at(tensor, ExternalData("elsewhere", 1, 2))
    point_at(tensor, PLACE)
    assert is_external(tensor)
    assert ExternalData.of(tensor) == PLACE


def test_offset_and_length_may_be_left_out():
    assert ExternalData.of(external(location="a")) == ExternalData("a", 0, None)


@pytest.mark.parametrize("fields", [{"offset": "-1"}, {"length": "-1"}, {"offset": "x"}])
def test_what_is_no_place_is_refused(fields):
    with pytest.raises(ValueError, match=r"negative|invalid literal"):
        ExternalData.of(external(location="a", **fields))


def test_a_field_that_is_given_twice_is_refused():
    tensor = external(location="a")
    tensor.external_data.add(key="location", value="b")
    with pytest.raises(ValueError, match="twice"):
        ExternalData.of(tensor)


def test_a_stored_tensor_is_named_relative_to_the_models_folder():
    stored = StoredTensor("w", Path("/models/weights/a.safetensors"), 128, 64, "float32", (4, 4))
    assert ExternalData.at(stored, Path("/models")) == PLACE


def test_data_in_the_model_leave_no_place():
    tensor = external(location="a")
    hold_data(tensor, b"1234")
    assert (is_external(tensor), len(tensor.external_data), tensor.raw_data) == (False, 0, b"1234")
