"""Where the data of an ONNX model's tensors lie when they are in other files: reading and stating such places.

Nothing here follows a place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel.core.stored_tensor import StoredTensor

if TYPE_CHECKING:
    from onnx import TensorProto

__all__ = ["ExternalData", "hold_data", "is_external", "point_at"]


@dataclass(frozen=True, slots=True)
class ExternalData:
    """What a tensor says of the place of its data.

    Attributes:
        location: A path relative to the model's folder, as it is stated: of an untrusted model it may lead anywhere.
        offset: First byte in the file.
        length: Number of bytes; None if it is not stated, and then it follows from shape and dtype.
    """

    location: str
    offset: int = 0
    length: int | None = None

    @classmethod
    def of(cls, tensor: TensorProto) -> ExternalData:
        """The place that a tensor states.

        Raises:
            ValueError: If a field is given twice, or a number is not one or is negative.
        """
        stated = {entry.key: entry.value for entry in tensor.external_data}
        if len(stated) != len(tensor.external_data):
            raise ValueError("a field is given twice")
        offset = int(stated.get("offset", 0))
        length = int(stated["length"]) if "length" in stated else None
        if offset < 0 or (length is not None and length < 0):
            raise ValueError("a place in a file is not negative")
        return cls(stated.get("location", ""), offset, length)

    @classmethod
    def at(cls, stored: StoredTensor, folder: Path) -> ExternalData:
        """The place of a stored tensor, for a model in `folder`, which must hold the file at any depth."""
        return cls(stored.file.relative_to(folder).as_posix(), stored.offset, stored.length)


def is_external(tensor: TensorProto) -> bool:
    """Whether a tensor's data lie in another file."""
    return tensor.data_location == tensor.EXTERNAL


def point_at(tensor: TensorProto, place: ExternalData) -> None:
    """Make a tensor state that its data lie there, and nothing else."""
    tensor.data_location = tensor.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", place.location), ("offset", place.offset), ("length", place.length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))


def hold_data(tensor: TensorProto, data: bytes) -> None:
    """Put a tensor's data into the model."""
    tensor.raw_data = data
    tensor.data_location = tensor.DEFAULT
    del tensor.external_data[:]
