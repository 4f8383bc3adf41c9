"""bfloat16 arithmetic for the CPU provider, which has few bfloat16 kernels besides those that move values.

Hardware with bfloat16 operands accumulates in float32 and rounds its results. This module does the same: each operator
computes in float32 between Casts, and its result is rounded to bfloat16 before anything reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from visionaccel.errors import ArtifactError

if TYPE_CHECKING:
    import onnx

_MOVES = frozenset(
    {
        *("Cast", "CastLike", "Constant", "ConstantOfShape", "Identity", "Shape"),
        *("Concat", "Flatten", "Gather", "GatherElements", "GatherND", "Reshape"),
        *("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    }
)
"""Standard operators that only move or convert values; ONNX Runtime has them in bfloat16."""


def emulate_bfloat16(model: bytes) -> bytes:
    """Make every bfloat16 operator of a model compute in float32 and round its result to bfloat16.

    Operators that only move values, float32 arithmetic, and the names and types of all values stay as they are.
    External data is neither read nor moved.

    Args:
        model: A serialized ONNX model of one flat graph.

    Returns:
        The model with Casts, or `model` itself if nothing computes in bfloat16.

    Raises:
        ArtifactError: If the model cannot be read, the type of a value is unknown, or its arithmetic is not in one flat
            graph.
    """
    import onnx

    bfloat16, float32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    parsed, types = _parse(model)
    nodes = parsed.graph.node
    narrow = {name for name, element in types.items() if element == bfloat16}
    if not any(_computes(node) and not narrow.isdisjoint((*node.input, *node.output)) for node in nodes):
        return model
    if parsed.functions or any(attribute.HasField("g") or attribute.graphs for n in nodes for attribute in n.attribute):
        raise ArtifactError(
            "the ONNX model has subgraphs or functions, but bfloat16 is emulated only in a flat graph.",
            hint="Inline them.",
        )
    for node in nodes:
        for name in node.output:
            if name and not types.get(name) and not narrow.isdisjoint(node.input):
                raise ArtifactError(
                    f"the type of value {name!r} of the ONNX model, an output of {node.op_type}, is unknown.",
                    hint="Write the model with standard operators, or declare the type in its value_info.",
                )

    taken = {name for node in nodes for name in (*node.input, *node.output)} | types.keys()
    widened: dict[str, str] = {}
    result: list[onnx.NodeProto] = []

    def wide_name(name: str) -> str:
        while (name := f"{name}.float32") in taken:
            pass
        taken.add(name)
        return name

    def cast(source: str, target: str, to: int) -> None:
        result.append(onnx.helper.make_node("Cast", [source], [target], name=f"Cast.{target}", to=to))

    for node in nodes:
        if not _computes(node):
            result.append(node)
            continue
        for place, name in enumerate(node.input):
            if name in narrow:
                if name not in widened:
                    widened[name] = wide_name(name)
                    cast(name, widened[name], float32)
                node.input[place] = widened[name]
        rounded = {place: name for place, name in enumerate(node.output) if name in narrow}
        for place, name in rounded.items():
            node.output[place] = wide_name(name)
        result.append(node)
        for place, name in rounded.items():
            cast(node.output[place], name, bfloat16)

    emulated = onnx.ModelProto()
    emulated.CopyFrom(parsed)
    del emulated.graph.node[:]
    emulated.graph.node.extend(result)
    return bytes(emulated.SerializeToString())


def _computes(node: onnx.NodeProto) -> bool:
    return node.domain not in ("", "ai.onnx") or node.op_type not in _MOVES


def _parse(model: bytes) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Return the model, and the element types of its values by name; unknown types are missing or 0."""
    import onnx

    try:
        parsed = onnx.load_model_from_string(model)
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception as error:
        raise ArtifactError(f"the ONNX model cannot be read: {error}.", hint="Write it again.") from error
    declared: Iterable[onnx.ValueInfoProto] = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in declared}
    return parsed, types | {initializer.name: initializer.data_type for initializer in graph.initializer}
