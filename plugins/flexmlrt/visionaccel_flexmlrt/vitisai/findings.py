"""What an artifact is: which tensors the device takes and gives, what is the host's, which grid, whose weights.

All of it is found out before anything is written, from the compiler's tables where they say it and from the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.program import EP_CONTEXT, HostSplit
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import BundleError, ConfigurationError
from visionaccel.families import Tower
from visionaccel_flexmlrt.vitisai.agreement import check_weights, matching_grid
from visionaccel_flexmlrt.vitisai.exported_operators import UnknownHostError, named
from visionaccel_flexmlrt.vitisai.extraction import host_operators
from visionaccel_flexmlrt.vitisai.graph import OnnxGraph, external_files, plain_file
from visionaccel_flexmlrt.vitisai.layout import Boundary, ImportRequest, VitisFolder, read_layout, several_partitions
from visionaccel_flexmlrt.vitisai.recognition import HostPart, end_operators, recognise_host

_PROVIDER = "VitisAIExecutionProvider"
_ORIENTATION = "The wrong orientation has the same shapes: run `visionaccel validate` before you use the bundle."
_NOT_COMPARED = (
    "the checkpoint has no vision weights to compare the artifact's with: run `visionaccel validate` against the whole "
    "checkpoint before you trust it."
)
_MOST_LISTED = 40


@dataclass(frozen=True)
class Findings:
    """What was found.

    Attributes:
        folder: The files.
        graph: The model that was compiled.
        grid: The grid that it is for.
        split: What is left to the host's own code; None if ONNX Runtime runs the host's operators.
        part: The host's part, if the family recognised it.
        boundary: What the device takes and gives, as far as anything but the recogniser says.
        warnings: What the user should know.
    """

    folder: VitisFolder
    graph: OnnxGraph
    grid: Grid
    split: HostSplit | None
    part: HostPart | None
    boundary: Boundary | None
    warnings: tuple[str, ...]


def find(tower: Tower, request: ImportRequest, weights: Mapping[str, StoredTensor]) -> Findings:
    """Look at an artifact and check it against a tower and the vision weights that its checkpoint has.

    Raises:
        BundleError: If it is damaged, of another tower, or its host part is not recognised where it must be.
        CheckpointError: If a weight cannot be read.
        ConfigurationError: If something is missing or ambiguous.
    """
    folder = read_layout(request)
    graph = OnnxGraph.load(folder.model)
    contexts = _contexts(graph)
    whole = folder.format == EP_CONTEXT  # ONNX Runtime runs the host's operators with the device's
    if whole:
        folder = replace(folder, files=_context_files(folder, graph, contexts))
    boundary = _boundary(folder, graph, contexts)
    warnings = folder.warnings
    try:
        part = recognise_host(tower.spec, graph, boundary)
    except UnknownHostError as unknown:
        if not whole:
            if not request.host_on_onnxrt or boundary is None:
                raise _unrecognised(folder, graph, boundary, unknown) from None
            warnings += ("the host's operators run on ONNX Runtime; nothing in them was compared with the checkpoint.",)
        if request.grid is None:
            raise ConfigurationError(
                f"{folder.model}: nothing that is known tells which grid it was compiled for: {unknown}.",
                hint=f"Name the grid with --grid. {_ORIENTATION}",
            ) from None
        warnings += (f"grid {request.grid.h}x{request.grid.w} was taken on trust. {_ORIENTATION}",)
        return Findings(folder, graph, request.grid, None, None, boundary, warnings)
    _check_boundary(part, boundary, folder)
    check_weights(part, weights)
    grid, split = matching_grid(tower, part.order, request.grid)
    if not set(part.weights) <= set(weights):
        warnings += (_NOT_COMPARED,)
    return Findings(folder, graph, grid, None if whole else split, part, boundary, warnings)


def _contexts(graph: OnnxGraph) -> list[onnx.NodeProto]:
    """The nodes that the VitisAI execution provider compiled."""
    found = []
    for node in graph.nodes:
        if node.op_type == "EPContext":
            source = next((a.s.decode(errors="replace") for a in node.attribute if a.name == "source"), "")
            if source != _PROVIDER:
                raise BundleError(
                    f"{graph.path}: node {node.name!r} was compiled by provider {source[:100]!r}, not {_PROVIDER}.",
                    hint="Import what the Vitis AI compiler wrote.",
                )
            found.append(node)
    return found


def _context_files(
    folder: VitisFolder, graph: OnnxGraph, contexts: Sequence[onnx.NodeProto]
) -> tuple[tuple[str, Path], ...]:
    """The files of a model that holds its compiled program, or names its file: the model first."""
    names = set(external_files(graph.model))
    if not contexts:
        raise ConfigurationError(
            f"{folder.folder} holds {folder.model.name} and nothing that was compiled from it: no .rai, no "
            "vaiml_par_0, and no EPContext node in the model.",
            hint="Compile the model first, or name the artifact with --artifact.",
        )
    for node in contexts:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        embedded, main = (attributes[n].i if n in attributes else 1 for n in ("embed_mode", "main_context"))
        context = attributes["ep_cache_context"].s if "ep_cache_context" in attributes else b""
        # A node that is not a main context shares the file of one that is, and may name none.
        if embedded != 1 and (main != 0 or context):
            names.add(context.decode(errors="replace"))
    files = [(name, plain_file(folder.model.parent, name, f"{folder.model}: the model")) for name in sorted(names)]
    return ((folder.model.name, folder.model), *files)


def _boundary(folder: VitisFolder, graph: OnnxGraph, contexts: list[onnx.NodeProto]) -> Boundary | None:
    """What the device takes and gives: from the compiler's table, else from the node that stands for it."""
    if len(contexts) > 1:
        if folder.format == EP_CONTEXT:
            return None
        raise several_partitions(folder.model, (repr(node.name) for node in contexts))
    node = None
    if contexts:
        sides = ([name for name in names if name] for names in (contexts[0].input, contexts[0].output))
        inputs, outputs = (tuple(graph.declared.get(n, TensorSpec(n, "float32", ())) for n in names) for names in sides)
        node = Boundary(inputs, outputs)
    if folder.boundary is None:
        return node
    for side in ("inputs", "outputs"):
        for spec in getattr(folder.boundary, side):
            if spec.name not in graph or (node and spec.name not in {s.name for s in getattr(node, side)}):
                raise BundleError(
                    f"{folder.artifact}: the device's tensor {spec.name!r} is not in {folder.model}.",
                    hint="Name the model that was compiled with --onnx.",
                )
    return folder.boundary


def _check_boundary(part: HostPart, boundary: Boundary | None, folder: VitisFolder) -> None:
    if boundary is None:
        return
    for ours, theirs in ((part.input, boundary.inputs[0]), (part.output, boundary.outputs[0])):
        shapes = [tuple(size for size in spec.shape if size != 1) for spec in (ours, theirs)]
        if theirs.shape and (shapes[0] != shapes[1] or ours.dtype != theirs.dtype):
            raise BundleError(
                f"{folder.artifact}: the device has {theirs}, and the model and the checkpoint's configuration make "
                f"{list(ours.shape)} of it.",
                hint="Pass the checkpoint and the model that the artifact was compiled from.",
            )


def _unrecognised(
    folder: VitisFolder, graph: OnnxGraph, boundary: Boundary | None, unknown: UnknownHostError
) -> BundleError:
    places = end_operators(graph) if boundary is None else host_operators(graph, boundary)
    listed = ", ".join(named(graph.nodes[place]) for place in places[:_MOST_LISTED]) or "none"
    more = f" and {len(places) - _MOST_LISTED} more" if len(places) > _MOST_LISTED else ""
    hint = (
        "Let ONNX Runtime run them with --host-on-onnxrt, or export the tower as transformers has it."
        if boundary is not None
        else "Add the compiler's flexmlrt-hsi.json to the folder, which names the device's tensors, and pass "
        "--host-on-onnxrt; or export the tower as transformers has it."
    )
    return BundleError(
        f"{folder.model}: the operators around the device's part are not this family's: {unknown}. "
        f"They are: {listed}{more}.",
        hint=hint,
    )
