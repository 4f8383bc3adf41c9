"""The external weights of an ONNX model, mapped into memory: what backends bind instead of handing over paths."""

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
    DTYPES["bfloat16"].onnx: "uint16",  # numpy has no bfloat16; runtimes look at the bytes alone
}


def external_weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers of a model's graph that lie in other files, by name."""
    return {each.name: each for each in model.graph.initializer if is_external(each)}


def map_weights(tensors: Iterable[onnx.TensorProto], folder: Path) -> dict[str, NDArray[Any]]:
    """External weights by name, read-only: float32, float16, or uint16 with the bytes of bfloat16.

    Each file is mapped once, however many weights lie in it: a mapping holds a descriptor.

    Args:
        tensors: The initializers.
        folder: What their locations are relative to.

    Raises:
        ArtifactError: If one is of another type, or cannot be read.
    """
    files: dict[Path, NDArray[np.uint8]] = {}
    found: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        if tensor.data_type not in _STORED:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            raise ArtifactError(f"weight {tensor.name!r} is of type {kind}.", hint="Export the program again.")
        dtype, shape = np.dtype(_STORED[tensor.data_type]), tuple(tensor.dims)
        path = folder
        try:
            place = ExternalData.of(tensor)
            path, offset = folder / place.location, place.offset
            if path not in files:
                files[path] = np.memmap(path, np.uint8, "r")
            stored = files[path][offset : offset + math.prod(shape) * dtype.itemsize]
            aligned = stored.copy() if offset % dtype.itemsize else stored
            found[tensor.name] = aligned.view(dtype).reshape(shape)
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"weight {tensor.name!r} cannot be read from {path}: {error}", hint="Fetch the file again."
            ) from error
    return found


def mapped_weights(model: bytes, folder: Path) -> dict[str, tuple[NDArray[Any], int]]:
    """The external weights of a serialized model and their ONNX types, by name, as `map_weights` gives them.

    Raises:
        ArtifactError: If the model or a weight cannot be read.
    """
    try:
        external = external_weights(onnx.load_model_from_string(model))
    except Exception as error:  # protobuf's decoding error is not part of its public interface
        raise ArtifactError(f"the ONNX model cannot be read: {error}.", hint="Write it again.") from error
    return {name: (array, external[name].data_type) for name, array in map_weights(external.values(), folder).items()}


def load_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Put the external weights of a model into it, for what runs models as they are; protobuf holds 2 GiB at most.

    Raises:
        ArtifactError: If a weight cannot be read.
    """
    external = external_weights(model)
    for name, array in map_weights(external.values(), folder).items():
        hold_data(external[name], array.tobytes())
