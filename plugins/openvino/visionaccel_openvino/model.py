"""Reads an ONNX program as an OpenVINO model whose weights are mapped files."""

import io
from collections.abc import Mapping
from typing import Any, TypeAlias

import onnx
import openvino
from numpy.typing import NDArray

from visionaccel.backends.onnx_products import parse_model
from visionaccel.backends.onnx_weights import external_weights, map_weights
from visionaccel.core.program import Program
from visionaccel.errors import ArtifactError

Mapped: TypeAlias = list[NDArray[Any]]
"""Mapped weights. A model that uses them reads their memory and does not keep it alive."""

_TYPES: Mapping[str, openvino.Type] = {
    "float32": openvino.Type.f32,
    "float16": openvino.Type.f16,
    "uint16": openvino.Type.bf16,
}
"""OpenVINO's types for the dtypes of mapped weights."""


def read_model(core: openvino.Core, program: Program) -> tuple[openvino.Model, Mapped]:
    """Read a program without reading its weights.

    OpenVINO looks for external data only next to a model's file, and follows no links. So the weights first become
    inputs of the graph, and then constants in mapped memory.

    Returns:
        The model, and the weights, which must live as long as anything compiled from it.

    Raises:
        ArtifactError: If the program has no model, or it does not fit its weights.
    """
    if program.model is None:
        raise ArtifactError(f"the ONNX program in {program.folder} has no model.", hint="Write it again.")
    proto = parse_model(program)
    external = _take_external(proto)
    try:
        model = core.read_model(io.BytesIO(proto.SerializeToString()))
    except RuntimeError as error:
        raise ArtifactError(
            f"OpenVINO {openvino.__version__} cannot read program {program.name!r}: {error}",
            hint="Update OpenVINO, or export the program again.",
        ) from error
    parameters = {parameter.get_friendly_name(): parameter for parameter in model.get_parameters()}
    mapped: Mapped = []
    for name, array in map_weights(external.values(), program.folder).items():
        mapped.append(array)
        # With an explicit type, OpenVINO accepts a read-only array.
        weight = openvino.Tensor(array, list(array.shape), _TYPES[array.dtype.name])
        parameter = parameters[name]
        parameter.output(0).replace(openvino.op.Constant(weight, shared_memory=True).output(0))
        model.remove_parameter(parameter)
    return model, mapped


def _take_external(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Replace the initializers with external data by inputs of the graph, and return them by name."""
    graph = proto.graph
    external = external_weights(proto)
    kept = [each for each in graph.initializer if each.name not in external]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        for name, tensor in external.items()
    )
    return external
