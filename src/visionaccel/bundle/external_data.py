"""Points the weights of an ONNX model at where they lie. What the model itself says of locations is never followed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel.bundle.onnx_tensors import check_tensor_names
from visionaccel.core.dtypes import DTYPES, FLOATS
from visionaccel.core.external_data import ExternalData, is_external, point_at
from visionaccel.core.onnx_graphs import every_tensor
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import BundleError

if TYPE_CHECKING:
    import onnx

__all__ = ["point_at_weights"]

_AGAIN = "Export the bundle again."
_MOST_DIMENSIONS = 32


def point_at_weights(model: bytes, weights: Mapping[str, StoredTensor], folder: Path) -> bytes:
    """The model with each external initializer read from the stored tensor of its name.

    Args:
        model: A serialized ONNX model.
        weights: Where the weights lie, by the names of the initializers.
        folder: External-data locations become relative to it; it must hold all of their files, at any depth.

    Raises:
        BundleError: If the model cannot be parsed, or names a weight that is not there or is of another size or dtype,
            or has external data anywhere else than in the initializers of its graph, or gives a name twice.
    """
    import onnx  # an extra: encoders that run no ONNX model do without

    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's decoding error is not part of its public interface
        raise BundleError(f"a program is no ONNX model: {error}", hint=_AGAIN) from error
    check_tensor_names(proto.graph, "a program")
    initializers = list(proto.graph.initializer)
    proto.graph.ClearField("initializer")
    if any(is_external(tensor) for tensor in every_tensor(proto)):
        raise BundleError("a program has external data that is no weight of its graph.", hint=_AGAIN)
    if any(node.op_type == "EPContext" for node in proto.graph.node):
        # It names a compiled model by a path that an execution provider follows.
        raise BundleError("a program wraps another one that lies elsewhere (EPContext).", hint="Export it as ONNX.")
    for initializer in initializers:
        if is_external(initializer):
            _point(initializer, weights, folder)
    proto.graph.initializer.extend(initializers)
    return bytes(proto.SerializeToString())


def _point(initializer: onnx.TensorProto, weights: Mapping[str, StoredTensor], folder: Path) -> None:
    stored = weights.get(initializer.name)
    if stored is None:
        raise BundleError(f"a program needs weight {initializer.name!r}, which is not there.", hint=_AGAIN)
    sizes = list(initializer.dims[:_MOST_DIMENSIONS])
    whole = len(sizes) == len(initializer.dims)  # the product of very many sizes alone takes minutes
    if (
        stored.dtype not in FLOATS
        or initializer.data_type != DTYPES[stored.dtype].onnx
        or not whole
        or min(sizes, default=1) < 0
        or math.prod(sizes) != math.prod(stored.shape)
    ):
        raise BundleError(
            f"a program needs weight {initializer.name!r} as {sizes} of another dtype or size than "
            f"{stored.dtype}{list(stored.shape)}.",
            hint=_AGAIN,
        )
    point_at(initializer, ExternalData.at(stored, folder))
