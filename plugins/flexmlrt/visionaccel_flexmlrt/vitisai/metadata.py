"""The JSON files in a cache of AMD's Vitis AI compiler: unknown fields are passed over, the others checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.invalid_values import problems_of
from visionaccel.errors import BundleError

__all__ = ["Connectivity", "DeviceTensor", "Edge", "PartitionInfo", "TensorTable", "read_metadata"]

_Name = Annotated[str, Field(min_length=1, max_length=1024)]
_Shape = Annotated[tuple[Annotated[int, Field(ge=1, le=2**31)], ...], Field(max_length=8)]
_M = TypeVar("_M", bound="_Model")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class DeviceTensor(_Model):
    """A tensor at the device's edge, as the CPU sees it."""

    tensor_name: _Name
    cpu_shape: _Shape
    cpu_dtype: _Name

    @property
    def spec(self) -> TensorSpec:
        """As the contract has it."""
        return TensorSpec(self.tensor_name, {"fp32": "float32"}.get(self.cpu_dtype, self.cpu_dtype), self.cpu_shape)


class TensorTable(_Model):
    """`flexmlrt-hsi.json`: what the device takes and gives."""

    inputs: Annotated[tuple[DeviceTensor, ...], Field(min_length=1, max_length=64)]
    outputs: Annotated[tuple[DeviceTensor, ...], Field(min_length=1, max_length=64)]


class PartitionInfo(_Model):
    """`partition-info.json`: what runs a partition, and whether its compilation came to an end."""

    runner_type: _Name
    status: _Name


class Edge(_Model):
    """A tensor that goes from one partition to another."""

    source_partition: _Name
    destination_partition: _Name
    shape: _Shape


class Connectivity(_Model):
    """`connectivity_metadata.json`: the partitions of the CPU and the device, and what goes between them."""

    execution_order: tuple[_Name, ...]
    graph_edges: tuple[Edge, ...]


def read_metadata(path: Path, kind: type[_M]) -> _M:
    """Read one of the files.

    Raises:
        BundleError: If it is missing, too large or malformed; names the file and the field.
    """
    hint = "Fetch the folder again, or compile the tower again."
    try:
        data = read_bounded(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(f"{path} cannot be read: {reason}.", hint=hint) from error
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{path} is not what the compiler writes: {problems_of(error)}.", hint=hint) from error
