"""Writes ONNX graphs directly, without tracing; weights are references to safetensors shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.dtypes import DTYPES, FLOATS
from visionaccel.core.onnx_graphs import ExternalData, point_at
from visionaccel.core.program import Precision
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import CheckpointError

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's fused operators."""

_WEIGHTS = ("float32", "float16", "bfloat16")
"""Dtypes of weights that graphs can refer to."""


class GraphWriter:
    """Collects the nodes and initializers of one graph; the methods return the names of the values that they make.

    Args:
        weights_folder: External-data locations are relative to it, without `..`.
        precision: Dtype of the weights and floating-point constants in the nodes.

    Attributes:
        bound: Values that replace names, such as those of inputs, in the nodes that are added from now on.
    """

    def __init__(self, weights_folder: Path, precision: Precision = "float32") -> None:
        self._folder, self.precision = weights_folder, precision
        self.bound: Mapping[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._casts: dict[str, str] = {}
        self._types: list[onnx.ValueInfoProto] = []

    def node(self, operator: str, inputs: Sequence[str], *, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.nodes(operator, inputs, [True], domain=domain, **attributes)[0]

    def nodes(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[bool], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; those marked False are left out."""
        number = len(self._nodes)
        names = [f"v{number}.{place}" if wanted else "" for place, wanted in enumerate(outputs)]
        given = [self.bound.get(name, name) for name in inputs]
        node = helper.make_node(operator, given, names, name=f"{operator}.{number}", domain=domain, **attributes)
        self._nodes.append(node)
        if domain == MICROSOFT and self.precision != "float32":
            # onnx infers no types through these operators, but code that rewrites low-precision graphs needs them.
            self._types += [
                helper.make_tensor_value_info(name, DTYPES[self.precision].onnx, None) for name in names if name
            ]
        return [name for name in names if name]

    def split(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Split a value along an axis; the value itself if there is only one part."""
        if len(sizes) == 1:
            return [value]
        return self.nodes("Split", [value, self.constant(sizes)], [True] * len(sizes), axis=axis)

    def concat(self, values: Sequence[str], axis: int) -> str:
        """Concatenate values along an axis; the value itself if there is only one."""
        return values[0] if len(values) == 1 else self.node("Concat", values, axis=axis)

    def rename(self, value: str, name: str) -> None:
        """Rename the output of a node, such as to a graph output."""
        for node in self._nodes:
            for place, output in enumerate(node.output):
                if output == value:
                    node.output[place] = name

    def constant(self, values: NDArray[Any] | np.generic | Sequence[int]) -> str:
        """Add a small constant, stored in the model; equal constants are stored once."""
        array = np.asarray(values)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self._constants:
            name = f"c{len(self._constants)}"
            self._constants[key] = name
            self._initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def weight(self, name: str, stored: StoredTensor, view: tuple[int, ...] | None = None) -> str:
        """Add a weight that stays in its shard, cast to the writer's precision; CheckpointError for its dtype.

        `view` is another shape of the same bytes, such as a convolution's kernel as a matrix.
        """
        if stored.dtype not in _WEIGHTS:
            raise CheckpointError(
                f"{stored.file}: {stored.name!r} has the unsupported dtype {stored.dtype}.",
                hint=f"Convert the checkpoint to one of {', '.join(_WEIGHTS)}.",
            )
        if name not in self._initializers:
            shape = view or stored.shape
            assert math.prod(shape) == math.prod(stored.shape)
            tensor = TensorProto(name=name, data_type=DTYPES[stored.dtype].onnx, dims=shape)
            point_at(tensor, ExternalData.at(stored, self._folder))
            self._initializers[name] = tensor
        if stored.dtype == self.precision:
            return name
        if name not in self._casts:
            self._casts[name] = self.narrow(name, always=True)
        return self._casts[name]

    def real(self, value: float) -> str:
        """Add a float32 number as a constant in the writer's precision."""
        return self.constant(np.asarray(value, np.float32).astype(FLOATS[self.precision]))

    def narrow(self, value: str, *, always: bool = False) -> str:
        """Cast a float32 value to the writer's precision; with `always`, a value of any float dtype."""
        if self.precision == "float32" and not always:
            return value
        return self.node("Cast", [value], to=DTYPES[self.precision].onnx)

    def widen(self, value: str) -> str:
        """Cast a value to float32."""
        return value if self.precision == "float32" else self.node("Cast", [value], to=TensorProto.FLOAT)

    def model(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], opset: int) -> onnx.ModelProto:
        """Finish the model; the nodes must use the names of the inputs and produce the names of the outputs."""
        domains = [helper.make_opsetid("", opset)]
        if any(node.domain == MICROSOFT for node in self._nodes):
            domains.append(helper.make_opsetid(MICROSOFT, 1))
        graph = helper.make_graph(
            self._nodes,
            "vision_tower",
            [_value_info(spec) for spec in inputs],
            [_value_info(spec) for spec in outputs],
            list(self._initializers.values()),
            value_info=self._types,
        )
        return helper.make_model(
            graph,
            opset_imports=domains,
            ir_version=helper.find_min_ir_version_for(domains, ignore_unknown=True),
            producer_name="visionaccel",
        )


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype].onnx, spec.shape)
