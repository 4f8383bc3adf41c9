"""Programs that an execution provider compiled: ONNX models with parts that only that provider can read.

In such a model (https://onnxruntime.ai/docs/execution-providers/EP-Context-Design.html) `EPContext` nodes replace what
was compiled. A node contains the name of a file that the provider opens, so the name is checked before the provider
sees the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.onnx_graphs import graphs_in, tensors_of
from visionaccel.core.program import Program
from visionaccel.errors import ArtifactError
from visionaccel_onnxrt.offload import EP_CONTEXT_OPERATOR, Offload, counted

if TYPE_CHECKING:
    import onnx

_AGAIN = "Compile the program again, and list its files in the bundle."
_MOST_MODEL_BYTES = 2**31 - 1
"""Protobuf's own limit."""


def verified_context(program: Program, provider: str) -> Path:
    """Return the file of a compiled program, after a check that it refers only to verified files next to it.

    Args:
        program: Its artifact is the ONNX model; the files next to it are its companions.
        provider: The execution provider that must have compiled it.

    Raises:
        ArtifactError: If it is not such a model, was compiled by a different provider, or refers to any other file.
    """
    if program.artifact is None:
        raise ArtifactError(f"the compiled program {program.name!r} has no file.", hint=_AGAIN)
    model = _parsed(_content(program), program.artifact)
    if model.functions:
        raise ArtifactError(
            f"{program.artifact} contains functions, which a compiled program cannot have.", hint=_AGAIN
        )
    contexts = 0
    for graph in graphs_in(model.graph):
        for node in graph.node:
            if node.op_type == EP_CONTEXT_OPERATOR:
                contexts += 1
                _check_node(node, program, provider)
        for tensor in tensors_of(graph):
            for entry in tensor.external_data:
                if entry.key == "location":
                    _check_file(entry.value, program, "its weights")
    if not contexts:
        raise ArtifactError(f"{program.artifact} contains no compiled program: it has no EPContext.", hint=_AGAIN)
    return program.artifact


def offload_of_context(path: Path) -> Offload | None:
    """Return the nodes inside and outside of the compiled parts of a model; None if it cannot be read.

    The CPU has no kernel for `EPContext`, so each one runs on the device.
    """
    try:
        model = _parsed(read_bounded(path, _MOST_MODEL_BYTES), path)
    except (OSError, ValueError, ArtifactError):
        return None
    kinds = [node.op_type for node in model.graph.node]
    outside = [kind for kind in kinds if kind != EP_CONTEXT_OPERATOR]
    return counted([EP_CONTEXT_OPERATOR] * (len(kinds) - len(outside)), outside, f"the nodes of {path.name}")


def _content(program: Program) -> bytes:
    assert program.artifact is not None
    if program.model is not None:
        return program.model()
    try:
        return read_bounded(program.artifact, _MOST_MODEL_BYTES)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{program.artifact} cannot be read: {error}", hint=_AGAIN) from error


def _parsed(data: bytes, path: Path) -> onnx.ModelProto:
    import onnx

    try:
        return onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's decoding error is not part of its public interface
        raise ArtifactError(f"{path} is not an ONNX model: {error}", hint=_AGAIN) from error


def _check_node(node: onnx.NodeProto, program: Program, provider: str) -> None:
    from onnx import AttributeProto

    attributes = {attribute.name: attribute for attribute in node.attribute}
    known = {
        "source": AttributeProto.STRING,
        "ep_cache_context": AttributeProto.STRING,
        "embed_mode": AttributeProto.INT,
        "main_context": AttributeProto.INT,
    }
    for name, kind in known.items():
        if name in attributes and attributes[name].type != kind:
            raise ArtifactError(f"{program.artifact}: {name} of an EPContext has the wrong type.", hint=_AGAIN)
    source = attributes["source"].s.decode(errors="replace") if "source" in attributes else ""
    if source != provider:
        raise ArtifactError(
            f"{program.artifact} was compiled by {source or 'an unnamed execution provider'!r}, not by {provider}.",
            hint="Open it with the execution provider that compiled it.",
        )
    embedded = attributes["embed_mode"].i if "embed_mode" in attributes else 1
    main = attributes["main_context"].i if "main_context" in attributes else 1
    named = attributes["ep_cache_context"].s if "ep_cache_context" in attributes else b""
    # A node that is not a main context shares the file of one that is, and may have no file name.
    if embedded != 1 and (main != 0 or named):
        _check_file(named.decode(errors="replace"), program, "its compiled part")


def _check_file(name: str, program: Program, what: str) -> None:
    """Require a plain name, of a file next to the model that was verified with it."""
    assert program.artifact is not None
    if not name or name in (".", "..") or any(character in name for character in "/\\:\0"):
        raise ArtifactError(
            f"{program.artifact} refers to {what} as {name!r}, which is not a plain file name.",
            hint="Do not use this program.",
        )
    file = program.artifact.parent / name
    if file not in program.companions.values() or not file.is_file():
        raise ArtifactError(
            f"{program.artifact} needs {name} next to it, but that is not among the program's verified files.",
            hint=_AGAIN,
        )
