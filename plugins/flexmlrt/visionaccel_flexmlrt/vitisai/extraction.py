"""Extracts the host's operators around a device's part into separate ONNX models, for hosts that are not recognised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from onnx import TensorProto, helper

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.onnx_graphs import is_external
from visionaccel.errors import BundleError
from visionaccel_flexmlrt.vitisai.graph import EXPORT_AGAIN, OnnxGraph, external_files
from visionaccel_flexmlrt.vitisai.layout import Boundary

_MOST_BYTES = 2**30
"""The most bytes of weights on one side, which are stored in its model; a patch embedding has 6 MB."""


def host_operators(graph: OnnxGraph, boundary: Boundary) -> list[int]:
    """Return the operators around a device's part."""
    return sorted(frozenset().union(*_sides(graph, boundary)))


def extract_host(graph: OnnxGraph, boundary: Boundary) -> tuple[bytes | None, bytes | None]:
    """Return the serialised models before and after a device's part, with their weights.

    The first computes the device's inputs from the graph's, the second the graph's outputs from the device's. Either is
    None if it would contain no operator.

    Raises:
        BundleError: If the second needs anything from the first, or one is not a valid model.
    """
    before, after = _sides(graph, boundary)
    given, taken = [s.name for s in boundary.inputs], [s.name for s in boundary.outputs]
    inputs = {spec.name for spec in graph.inputs}
    fed = graph.descendants(inputs)
    stray = sorted(graph.descendants(inputs, given) & after)
    direct = inputs & graph.reads(after)
    if stray or direct or before & graph.descendants(taken):
        names = sorted(direct) or [graph.nodes[place].name for place in stray]
        raise BundleError(
            f"{graph.path}: the operators after the device read tensors from before it, at {names}.",
            hint="Compile so that everything between the host's two parts is one partition.",
        )
    if any(graph.makers.get(name) not in fed for name in given) and not set(given) <= inputs:
        raise BundleError(f"{graph.path}: the device's inputs do not depend on the model's.", hint=EXPORT_AGAIN)
    return (
        _extract(graph, before, graph.inputs, boundary.inputs, "host_before") if before else None,
        _extract(graph, after, boundary.outputs, graph.outputs, "host_after") if after else None,
    )


def _sides(graph: OnnxGraph, boundary: Boundary) -> tuple[frozenset[int], frozenset[int]]:
    """Return the operators before and after a device's part."""
    given, taken, ends = ([spec.name for spec in specs] for specs in (boundary.inputs, boundary.outputs, graph.outputs))
    return graph.ancestors(given), graph.ancestors(ends, taken)


def _extract(
    graph: OnnxGraph, places: Iterable[int], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], name: str
) -> bytes:
    nodes = [graph.nodes[place] for place in sorted(places)]
    wanted = graph.reads(places) | {spec.name for spec in outputs}
    weights = [graph.weights[name] for name in sorted(wanted) if name in graph.weights]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            name,
            [_value(spec) for spec in inputs],
            [_value(spec) for spec in outputs],
            [_inline(graph, tensor) for tensor in weights],
        ),
        opset_imports=graph.model.opset_import,
        ir_version=graph.model.ir_version,
        functions=graph.model.functions,
        producer_name="visionaccel",
    )
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _MOST_BYTES:
        raise BundleError(
            f"{graph.path}: the host's part has more than {_MOST_BYTES} bytes of weights.", hint=EXPORT_AGAIN
        )
    if external_files(model):
        raise BundleError(f"{graph.path}: a constant of the host's part has external data.", hint=EXPORT_AGAIN)
    try:
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())
    except Exception as error:  # protobuf's errors too, which are not part of its public interface
        raise BundleError(f"{graph.path}: the host's part is not a valid model: {error}", hint=EXPORT_AGAIN) from error


def _inline(graph: OnnxGraph, tensor: onnx.TensorProto) -> onnx.TensorProto:
    """Return a weight with its data in the model."""
    if not is_external(tensor):
        return tensor
    values = graph.values(tensor)
    if values is None:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise BundleError(
            f"{graph.path}: weight {tensor.name!r} of the host's part has the unsupported type {kind}.",
            hint=EXPORT_AGAIN,
        )
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=values.tobytes())


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    if spec.dtype != "float32":
        raise BundleError(f"{spec} is an input or output of the host's part, but is not float32.", hint=EXPORT_AGAIN)
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape)
