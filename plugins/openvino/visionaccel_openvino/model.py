"""An ONNX program as an OpenVINO model whose weights are the stored bytes, mapped into memory."""

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
"""Mapped weights: a model made from them reads their memory and does not keep it alive."""

_TYPES: Mapping[str, openvino.Type] = {
    "float32": openvino.Type.f32,
    "float16": openvino.Type.f16,
    "uint16": openvino.Type.bf16,
}
"""OpenVINO's names of the types of mapped weights."""


def read_model(core: openvino.Core, program: Program) -> tuple[openvino.Model, Mapped]:
    """Read a program without reading its weights.

    OpenVINO's reader looks for external data next to a model's file only, and follows no link. So the weights are made
    inputs of the graph first, and constants over the mapped files afterwards.

    Args:
        core: Reads the model.
        program: An ONNX program.

    Returns:
        The model, and what must live as long as what is compiled from it.

    Raises:
        ArtifactError: If there is no model, or it does not fit its weights.
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
        # Given a type, OpenVINO takes an array that may not be written to.
        weight = openvino.Tensor(array, list(array.shape), _TYPES[array.dtype.name])
        parameter = parameters[name]
        parameter.output(0).replace(openvino.op.Constant(weight, shared_memory=True).output(0))
        model.remove_parameter(parameter)
    return model, mapped


def _take_external(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers that lie in other files, by name; in the graph, inputs take their places."""
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
