"""Tensors of ONNX models: their names must be unique, and weights are read from the tower's files.

The references to files that a model itself contains are never followed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel.core.dtypes import DTYPES, FLOATS
from visionaccel.core.onnx_graphs import ExternalData, every_tensor, is_external, point_at
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import BundleError

if TYPE_CHECKING:
    import onnx

_AGAIN = "Export the model again."
_MOST_DIMENSIONS = 32


def point_at_weights(model: bytes, weights: Mapping[str, StoredTensor], folder: Path) -> bytes:
    """Return a serialized model in which each external initializer refers to the stored tensor of its name.

    External-data locations become relative to `folder`, which must contain the files of all weights, at any depth.

    Raises:
        BundleError: If the model cannot be parsed, needs a weight that is missing or has a different size or dtype, has
            external data outside its graph's initializers, uses a name twice, or wraps a compiled model.
    """
    import onnx  # an extra, for encoders that run ONNX models

    try:
        proto = onnx.load_model_from_string(model)
    except Exception as error:  # protobuf's decoding error is not part of its public interface
        raise BundleError(f"a program is not an ONNX model: {error}", hint=_AGAIN) from error
    check_names(proto.graph, "a program")
    initializers = list(proto.graph.initializer)
    proto.graph.ClearField("initializer")
    if any(is_external(tensor) for tensor in every_tensor(proto)):
        raise BundleError("a program has external data that is not a weight of its graph.", hint=_AGAIN)
    if any(node.op_type == "EPContext" for node in proto.graph.node):
        # It refers to a compiled model by a path that an execution provider follows.
        raise BundleError("a program wraps a program in a different file (EPContext).", hint="Export it as ONNX.")
    for initializer in initializers:
        if is_external(initializer):
            _point(initializer, weights, folder)
    proto.graph.initializer.extend(initializers)
    return bytes(proto.SerializeToString())


def _point(initializer: onnx.TensorProto, weights: Mapping[str, StoredTensor], folder: Path) -> None:
    stored = weights.get(initializer.name)
    if stored is None:
        raise BundleError(f"a program needs weight {initializer.name!r}, which is missing.", hint=_AGAIN)
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
            f"a program needs weight {initializer.name!r} as {sizes}, but the stored weight has a different dtype or "
            f"size: "
            f"{stored.dtype}{list(stored.shape)}.",
            hint=_AGAIN,
        )
    point_at(initializer, ExternalData.at(stored, folder))


def check_names(graph: onnx.GraphProto, where: object) -> None:
    """Raise BundleError, which begins with `where`, if two weights, inputs or outputs of nodes have the same name."""
    weights = Counter(tensor.name for tensor in graph.initializer)
    weights.update(tensor.values.name for tensor in graph.sparse_initializer)
    twice = next((name for name, count in weights.items() if count > 1), None)
    if twice is not None:
        raise BundleError(f"{where}: two weights are named {twice!r}.", hint=_AGAIN)
    made = Counter(name for node in graph.node for name in node.output if name)
    made.update(value.name for value in graph.input if value.name not in weights)
    twice = next((name for name, count in made.items() if count > 1 or name in weights), None)
    if twice is not None:
        raise BundleError(f"{where}: more than one input, weight or operator defines {twice!r}.", hint=_AGAIN)
