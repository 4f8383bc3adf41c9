"""Writes ONNX graphs directly: nodes in order, weights referenced in their safetensors shards; nothing is traced."""

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
from visionaccel.core.tower_spec import APART, JOINT, Linear, Norm, TowerSpec
from visionaccel.errors import CheckpointError

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's fused operators."""

_WEIGHTS = ("float32", "float16", "bfloat16")
"""Dtypes of weights that a graph may refer to."""


class GraphWriter:
    """Collects the nodes and initializers of one graph.

    Values are named by the caller or numbered; every method returns the name of the value it makes.

    Args:
        weights_folder: External-data locations are written relative to it, without `..`.
        precision: Dtype of weights and floating constants as the nodes use them.
    """

    def __init__(self, weights_folder: Path, precision: Precision = "float32") -> None:
        self._folder = weights_folder
        self.precision = precision
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self._casts: dict[str, str] = {}
        self._types: list[onnx.ValueInfoProto] = []

    @property
    def written(self) -> int:
        """Nodes written so far."""
        return len(self._nodes)

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
        if domain == MICROSOFT and self.precision != "float32":
            # onnx infers no types through these operators, and code that rewrites a graph of low precision needs them.
            self._types += [
                helper.make_tensor_value_info(name, DTYPES[self.precision].onnx, None) for name in names if name
            ]
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

    def weight(self, name: str, stored: StoredTensor, view: tuple[int, ...] | None = None) -> str:
        """A value of a weight that stays in its shard; one of another dtype than the precision is read through a Cast.

        Args:
            name: Its name in the graph.
            stored: Where it lies.
            view: Another shape of the same bytes, such as a convolution's kernel as a matrix.

        Raises:
            CheckpointError: If the stored dtype is not one that graphs refer to.
        """
        if stored.dtype not in _WEIGHTS:
            raise CheckpointError(
                f"{stored.file}: {stored.name!r} is {stored.dtype}; a graph's weights are {', '.join(_WEIGHTS)}.",
                hint="Convert the checkpoint to one of these.",
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

    def real(self, values: NDArray[Any] | np.floating[Any]) -> str:
        """A floating constant in the writer's precision."""
        return self.constant(np.asarray(values).astype(FLOATS[self.precision]))

    def narrow(self, value: str, *, always: bool = False) -> str:
        """A float32 value in the writer's precision; with `always`, of any float dtype."""
        if self.precision == "float32" and not always:
            return value
        return self.node("Cast", [value], to=DTYPES[self.precision].onnx)

    def widen(self, value: str) -> str:
        """A value of the writer's precision in float32."""
        return value if self.precision == "float32" else self.node("Cast", [value], to=TensorProto.FLOAT)

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
            [value_info(spec) for spec in inputs],
            [value_info(spec) for spec in outputs],
            list(self._initializers.values()),
            value_info=self._types,
        )
        return helper.make_model(
            graph,
            opset_imports=domains,
            ir_version=helper.find_min_ir_version_for(domains, ignore_unknown=True),
            producer_name="visionaccel",
        )


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    """An input or output of a graph as ONNX declares it."""
    return helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype].onnx, spec.shape)


class GraphWeights:
    """References to a tower's weights in one graph, by the names of its description, and the products with them.

    Args:
        spec: The tower.
        weights: Its tensors by the spec's names.
        writer: The graph.
    """

    def __init__(self, spec: TowerSpec, weights: Mapping[str, StoredTensor], writer: GraphWriter) -> None:
        self._spec, self._weights, self._g = spec, weights, writer

    def weight(self, name: str, view: tuple[int, ...] | None = None) -> str:
        """A weight, seen as `view`.

        Raises:
            CheckpointError: If it is missing, or of a dtype that graphs do not refer to.
        """
        if name not in self._weights:
            raise CheckpointError(
                f"the checkpoint's vision tower has no tensor {name!r}.",
                hint="Pass a complete checkpoint; a checkpoint stripped of its vision weights cannot be written.",
            )
        return self._g.weight(name, self._weights[name], view)

    def norm(self, step: Norm, place: str) -> tuple[str, str]:
        """Scale and bias of a normalisation; the bias is empty where it has none."""
        name = place + step.name
        return self.weight(f"{name}.weight"), self.weight(f"{name}.bias") if step.kind == "layer" else ""

    def linear(self, step: Linear, place: str, x: str) -> str:
        """A linear layer of [rows, inputs]; `transB` takes the stored layout as it is."""
        g, name, matrix = self._g, place + step.name, (step.outputs, step.inputs)
        if step.kernel:  # its axes are moved, which a runtime does once
            moved = g.node("Transpose", [self.weight(f"{name}.weight")], perm=[0, 2, 3, 1])
            weight = g.node("Reshape", [moved, g.constant(matrix)])
        else:
            weight = self.weight(f"{name}.weight", matrix)
        bias = [self.weight(f"{name}.bias")] if step.bias else []
        return g.node("Gemm", [x, weight, *bias], transB=1)

    def joint_projections(self, x: str, place: str) -> str:
        """Queries, keys and values of a block side by side: [rows, 3 * hidden]."""
        if f"{place}{APART[0]}.weight" in self._weights and f"{place}{JOINT}.weight" not in self._weights:
            return self._g.node("Concat", self.projections(x, place), axis=1)
        return self.linear(self._spec.qkv, place, x)

    def projections(self, x: str, place: str) -> list[str]:
        """Queries, keys and values of a block, each [rows, hidden]."""
        hidden = self._spec.hidden
        if f"{place}{APART[0]}.weight" in self._weights:
            return [self.linear(Linear(part, hidden, hidden, self._spec.qkv.bias), place, x) for part in APART]
        joint = self.joint_projections(x, place)
        return self._g.nodes("Split", [joint, self._g.constant([hidden] * 3)], [True] * 3, axis=1)
