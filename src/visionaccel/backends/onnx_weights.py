"""Maps the external weights of an ONNX model into memory, so that backends bind arrays instead of passing paths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from visionaccel.core.dtypes import DTYPES
from visionaccel.core.onnx_graphs import ExternalData, hold_data, is_external
from visionaccel.errors import ArtifactError

_STORED: Mapping[int, str] = {
    **{DTYPES[name].onnx: name for name in ("float32", "float16")},
    DTYPES["bfloat16"].onnx: "uint16",  # numpy has no bfloat16; runtimes only read the bytes
}


def parse_onnx(model: bytes, what: str) -> onnx.ModelProto:
    """Parse a serialized model; raises ArtifactError, which calls it `what`, if it is not an ONNX model."""
    try:
        return onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's decoding error is not part of its public interface
        raise ArtifactError(f"{what} is not an ONNX model: {error}.", hint="Export it again.") from error


def external_weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return the initializers of a model's graph whose data is in other files, by name."""
    return {each.name: each for each in model.graph.initializer if is_external(each)}


def map_weights(tensors: Iterable[onnx.TensorProto], folder: Path) -> dict[str, NDArray[Any]]:
    """Map external weights: read-only arrays by name, in float32, float16, or uint16 with the bytes of bfloat16.

    Each file is mapped once, however many weights it holds, because a mapping keeps a file descriptor open. The arrays
    keep the mappings alive. The locations are relative to `folder`.

    Raises:
        ArtifactError: If a weight has a different type, or cannot be read.
    """
    files: dict[Path, NDArray[np.uint8]] = {}
    found: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        if tensor.data_type not in _STORED:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            raise ArtifactError(
                f"weight {tensor.name!r} has the unsupported type {kind}.", hint="Export the program again."
            )
        dtype, shape = np.dtype(_STORED[tensor.data_type]), tuple(tensor.dims)
        path = folder
        try:
            place = ExternalData.of(tensor)
            path, offset = folder / place.location, place.offset
            if path not in files:
                files[path] = np.memmap(path, np.uint8, "r")
            stored = files[path][offset : offset + math.prod(shape) * dtype.itemsize]
            found[tensor.name] = np.require(stored.view(dtype), requirements="A").reshape(shape)
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"weight {tensor.name!r} cannot be read from {path}: {error}", hint="Fetch the file again."
            ) from error
    return found


def mapped_weights(model: bytes, folder: Path) -> dict[str, tuple[NDArray[Any], int]]:
    """Map the external weights of a serialized model; returns each, as `map_weights` does, with its ONNX type, by name.

    Raises:
        ArtifactError: If the model or a weight cannot be read.
    """
    external = external_weights(parse_onnx(model, "the program"))
    return {name: (array, external[name].data_type) for name, array in map_weights(external.values(), folder).items()}


def load_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Copy the external weights of a model into it, for runtimes that take whole models; protobuf holds up to 2 GiB.

    Raises:
        ArtifactError: If a weight cannot be read.
    """
    external = external_weights(model)
    for name, array in map_weights(external.values(), folder).items():
        hold_data(external[name], array.tobytes())
