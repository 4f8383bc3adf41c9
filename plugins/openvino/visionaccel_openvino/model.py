"""An ONNX program as an OpenVINO model whose weights are the checkpoint's own bytes, mapped into memory."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import openvino
from numpy.typing import NDArray

from visionaccel.errors import ArtifactError
from visionaccel.program import Program

__all__ = ["Mapped", "read_model"]

Mapped: TypeAlias = list[NDArray[Any]]
"""Mapped weights: a model made from them reads their memory and does not keep it alive."""

_STORED: Mapping[int, tuple[str, str]] = {
    onnx.TensorProto.FLOAT: ("f32", "float32"),
    onnx.TensorProto.FLOAT16: ("f16", "float16"),
    # numpy has no bfloat16; its bytes are all that OpenVINO looks at.
    onnx.TensorProto.BFLOAT16: ("bf16", "uint16"),
}


def read_model(core: openvino.Core, program: Program) -> tuple[openvino.Model, Mapped]:
    """Read a program without reading its weights.

    OpenVINO's reader looks for external data beside a model's file only, and through no link. So the weights are made
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
    try:
        proto = onnx.load_model_from_string(program.model())
    except Exception as error:
        raise ArtifactError(f"program {program.name!r} is no ONNX model: {error}.", hint="Write it again.") from error
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
    for name, tensor in external.items():
        kind, array = _map(tensor, program.folder)
        mapped.append(array)
        # Given a type, OpenVINO takes an array that may not be written to.
        weight = openvino.Tensor(array, list(tensor.dims), getattr(openvino.Type, kind))
        parameter = parameters[name]
        parameter.output(0).replace(openvino.op.Constant(weight, shared_memory=True).output(0))
        model.remove_parameter(parameter)
    return model, mapped


def _take_external(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers that lie in other files, by name; in the graph, inputs take their places."""
    graph = proto.graph
    external = {each.name: each for each in graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL}
    kept = [each for each in graph.initializer if each.name not in external]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
        for name, tensor in external.items()
    )
    return external


def _map(tensor: onnx.TensorProto, folder: Path) -> tuple[str, NDArray[Any]]:
    """OpenVINO's name of a weight's type, and its elements; read-only."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    if tensor.data_type not in _STORED:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        raise ArtifactError(f"weight {tensor.name!r} is of type {kind}.", hint="Export the program again.")
    kind, dtype = _STORED[tensor.data_type]
    path = folder / where["location"]
    offset, shape = int(where.get("offset", 0)), tuple(tensor.dims)
    try:
        if offset % np.dtype(dtype).itemsize:  # a mapping of it would be misaligned
            return kind, np.fromfile(path, dtype, int(np.prod(shape)), offset=offset).reshape(shape)
        return kind, np.memmap(path, dtype, "r", offset, shape)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"weight {tensor.name!r} cannot be read from {path}: {error}", hint="Fetch the file again."
        ) from error
