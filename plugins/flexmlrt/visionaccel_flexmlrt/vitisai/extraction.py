"""The host's operators around a device's part as separate ONNX models, for hosts that are not recognised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from onnx import TensorProto, helper

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.onnx_graphs import is_external
from visionaccel.errors import BundleError
from visionaccel_flexmlrt.vitisai.graph import OnnxGraph, external_files
from visionaccel_flexmlrt.vitisai.layout import Boundary

_AGAIN = "Export and compile the tower again."
_MOST_BYTES = 2**30
"""Most weights of one side of the host, which are stored within its model; a patch embedding has 6 MB."""


def host_operators(graph: OnnxGraph, boundary: Boundary) -> list[int]:
    """The operators around a device's part."""
    return sorted(frozenset().union(*_sides(graph, boundary)))


def extract_host(graph: OnnxGraph, boundary: Boundary) -> tuple[bytes | None, bytes | None]:
    """The models before and after a device's part, weights within.

    One leads from the graph's inputs to what the device takes, one from what it gives to the graph's outputs; None
    where the device takes the inputs or gives the outputs themselves.

    Raises:
        BundleError: If the parts touch each other elsewhere, or are not valid models.
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
            f"{graph.path}: the operators after the device take from those before it, at {names}.",
            hint="Compile so that everything between the host's two parts is one partition.",
        )
    if any(graph.makers.get(name) not in fed for name in given) and not set(given) <= inputs:
        raise BundleError(f"{graph.path}: what the device takes does not depend on the input.", hint=_AGAIN)
    return (
        _extract(graph, before, graph.inputs, boundary.inputs, "host_before") if before else None,
        _extract(graph, after, boundary.outputs, graph.outputs, "host_after") if after else None,
    )


def _sides(graph: OnnxGraph, boundary: Boundary) -> tuple[frozenset[int], frozenset[int]]:
    given, taken = ([s.name for s in specs] for specs in (boundary.inputs, boundary.outputs))
    return graph.ancestors(given), graph.ancestors([spec.name for spec in graph.outputs], taken)


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
        raise BundleError(f"{graph.path}: the host's part has more than {_MOST_BYTES} bytes of weights.", hint=_AGAIN)
    if external_files(model):
        raise BundleError(f"{graph.path}: a constant of the host's part has external data.", hint=_AGAIN)
    try:
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())
    except Exception as error:  # protobuf's errors too, which are not part of its public interface
        raise BundleError(f"{graph.path}: the host's part is not a valid model: {error}", hint=_AGAIN) from error


def _inline(graph: OnnxGraph, tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A weight with its data within."""
    if not is_external(tensor):
        return tensor
    values = graph.values(tensor)
    if values is None:
        kind = TensorProto.DataType.Name(tensor.data_type)
        raise BundleError(f"{graph.path}: weight {tensor.name!r} of the host is {kind}.", hint=_AGAIN)
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=values.tobytes())


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    if spec.dtype != "float32":
        raise BundleError(f"{spec} is at the edge of the host's part and not float32.", hint=_AGAIN)
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape)
