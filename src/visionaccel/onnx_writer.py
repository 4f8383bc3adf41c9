"""Writes ONNX graphs directly: nodes in order, weights referenced in their safetensors shards; nothing is traced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from visionaccel.checkpoint import StoredTensor
from visionaccel.contracts import TensorSpec
from visionaccel.errors import CheckpointError

__all__ = ["MICROSOFT", "GraphWriter"]

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's fused operators."""

_FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_TYPES = {**_FLOATS, "int64": TensorProto.INT64, "int32": TensorProto.INT32}


class GraphWriter:
    """Collects the nodes and initializers of one graph.

    Values are named by the caller or numbered; every method returns the name of the value it makes.

    Args:
        weights_folder: External-data locations are written relative to it, without `..`.
    """

    def __init__(self, weights_folder: Path) -> None:
        self._folder = weights_folder
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._casts: dict[str, str] = {}

    def node(self, operator: str, inputs: Sequence[str], *, domain: str = "", **attributes: Any) -> str:
        """A node with one output."""
        return self.nodes(operator, inputs, [True], domain=domain, **attributes)[0]

    def nodes(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[bool], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node with several outputs; those marked False are left out. Returns the names of the others."""
        number = len(self._nodes)
        names = [f"v{number}.{place}" if wanted else "" for place, wanted in enumerate(outputs)]
        node = helper.make_node(operator, inputs, names, name=f"{operator}.{number}", domain=domain, **attributes)
        self._nodes.append(node)
        return [name for name in names if name]

    def rename(self, value: str, name: str) -> None:
        """Give a value that a node made another name, such as that of a graph output."""
        for node in self._nodes:
            for place, output in enumerate(node.output):
                if output == value:
                    node.output[place] = name

    def constant(self, values: NDArray[Any] | np.generic | Sequence[int]) -> str:
        """A small constant, stored in the model; equal constants are stored once."""
        array = np.asarray(values)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._constants:
            name = f"c{len(self._constants)}"
            self._constants[key] = name
            self._initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def weight(self, stored: StoredTensor, shape: tuple[int, ...], view: tuple[int, ...] | None = None) -> str:
        """A float32 value of a weight that stays in its shard; bfloat16 and float16 are read through a Cast.

        Args:
            stored: Where the weight lies.
            shape: The shape that the tower's configuration demands.
            view: Another shape of the same bytes, such as a convolution's kernel as a matrix.

        Raises:
            CheckpointError: If the stored shape or dtype is not what is demanded.
        """
        if stored.shape != shape or stored.dtype not in _FLOATS:
            raise CheckpointError(
                f"{stored.file}: {stored.name!r} is {stored.dtype}{list(stored.shape)}; the configuration demands "
                f"{list(shape)} in {', '.join(_FLOATS)}.",
                hint="Configuration and weights are of different models, or the vision tower is quantized.",
            )
        if stored.name not in self._initializers:
            tensor = TensorProto(name=stored.name, data_type=_FLOATS[stored.dtype], data_location=TensorProto.EXTERNAL)
            tensor.dims.extend(view or shape)
            location = stored.file.relative_to(self._folder).as_posix()
            for key, value in (("location", location), ("offset", stored.offset), ("length", stored.length)):
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[stored.name] = tensor
            assert math.prod(view or shape) == math.prod(shape)
        if stored.dtype == "float32":
            return stored.name
        if stored.name not in self._casts:
            self._casts[stored.name] = self.node("Cast", [stored.name], to=TensorProto.FLOAT)
        return self._casts[stored.name]

    def model(
        self, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, opset: int, microsoft: bool
    ) -> onnx.ModelProto:
        """The finished model.

        Args:
            name: The graph's name.
            inputs: Graph inputs; the nodes use their names.
            outputs: Graph outputs; nodes made values of their names.
            opset: Version of the standard operators.
            microsoft: Whether `com.microsoft` operators are used.
        """
        domains = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(MICROSOFT, 1)] if microsoft else [])
        graph = helper.make_graph(
            self._nodes,
            name,
            [_value_info(spec) for spec in inputs],
            [_value_info(spec) for spec in outputs],
            list(self._initializers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=domains,
            ir_version=helper.find_min_ir_version_for(domains, ignore_unknown=True),
            producer_name="visionaccel",
        )


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], spec.shape)
