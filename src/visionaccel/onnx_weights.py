"""The external weights of an ONNX model, mapped into memory: what backends bind instead of handing over paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from visionaccel.errors import ArtifactError

__all__ = ["external_weights", "map_weight"]

_STORED: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "uint16",  # numpy has no bfloat16; runtimes look at the bytes alone
}


def external_weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers of a model's graph that lie in other files, by name."""
    return {each.name: each for each in model.graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL}


def map_weight(tensor: onnx.TensorProto, folder: Path) -> NDArray[Any]:
    """An external weight in its own shape, read-only: float32, float16, or uint16 with the bytes of bfloat16.

    Args:
        tensor: The initializer.
        folder: What its location is relative to.

    Raises:
        ArtifactError: If it is of another type, or cannot be read.
    """
    where = {entry.key: entry.value for entry in tensor.external_data}
    if tensor.data_type not in _STORED:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        raise ArtifactError(f"weight {tensor.name!r} is of type {kind}.", hint="Export the program again.")
    dtype = np.dtype(_STORED[tensor.data_type])
    path = folder / where["location"]
    offset, shape = int(where.get("offset", 0)), tuple(tensor.dims)
    try:
        if offset % dtype.itemsize:  # a mapping of it would be misaligned
            return np.fromfile(path, dtype, int(np.prod(shape)), offset=offset).reshape(shape)
        return np.memmap(path, dtype, "r", offset, shape)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"weight {tensor.name!r} cannot be read from {path}: {error}", hint="Fetch the file again."
        ) from error
