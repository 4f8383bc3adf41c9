"""Finds out what an artifact is, and checks it against a tower and the vision weights of its checkpoint.

Everything is found out before anything is written: the device's tensors, the host's part, the grid and the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from visionaccel.bundle import MOST_PATCHES
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.program import EP_CONTEXT, HostSplit
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import BundleError, ConfigurationError
from visionaccel.families import Tower
from visionaccel.towers import GROUPED, RASTER, window_order
from visionaccel_flexmlrt.vitisai.extraction import host_operators
from visionaccel_flexmlrt.vitisai.graph import OTHER_CHECKPOINT, OnnxGraph, external_files, plain_file, squeezed
from visionaccel_flexmlrt.vitisai.layout import Boundary, ImportRequest, VitisFolder, read_layout, several_partitions
from visionaccel_flexmlrt.vitisai.recognition import (
    HostPart,
    UnknownHostError,
    end_operators,
    named,
    recognise_host,
)

_PROVIDER = "VitisAIExecutionProvider"
_ORIENTATION = "The wrong orientation has the same shapes: run `visionaccel validate` before you use the bundle."
_NOT_COMPARED = (
    "the checkpoint has no vision weights to compare with the artifact's: run `visionaccel validate` against the whole "
    "checkpoint before you trust it."
)
_MOST_LISTED = 40
_TOLERANCE = 1e-6
"""The largest difference of a weight, as a share of its largest element. Exporters that fold operators into a weight
change its last float32 bits, by about 1e-7 of it; the first steps of training change a weight by more."""


@dataclass(frozen=True)
class Findings:
    """What was found out about an artifact.

    Attributes:
        graph: The model that was compiled.
        split: The host's part that the core runs; None if ONNX Runtime runs the host's operators.
        part: The host's part, if it was recognised.
        boundary: The device's inputs and outputs, if the compiler's files or the model declare them.
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
    """Check an artifact against a tower and the vision weights that its checkpoint has.

    Raises:
        BundleError: If it is damaged, of a different tower, or its host part is not recognised but must be.
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
            warnings += ("the host's operators run on ONNX Runtime and were not compared with the checkpoint.",)
        if request.grid is None:
            raise ConfigurationError(
                f"{folder.model}: cannot tell which grid it was compiled for: {unknown}.",
                hint=f"Set the grid with --grid. {_ORIENTATION}",
            ) from None
        warnings += (f"grid {request.grid.h}x{request.grid.w} could not be checked. {_ORIENTATION}",)
        return Findings(folder, graph, request.grid, None, None, boundary, warnings)
    _check_boundary(part, boundary, folder)
    _check_weights(part, weights)
    grid, split = _matching_grid(tower, part.order, request.grid)
    if not set(part.weights) <= set(weights):
        warnings += (_NOT_COMPARED,)
    return Findings(folder, graph, grid, None if whole else split, part, boundary, warnings)


def _contexts(graph: OnnxGraph) -> list[onnx.NodeProto]:
    """Return the nodes that the VitisAI execution provider compiled."""
    found = [node for node in graph.nodes if node.op_type == "EPContext"]
    for node in found:
        source = next((a.s.decode(errors="replace") for a in node.attribute if a.name == "source"), "")
        if source != _PROVIDER:
            raise BundleError(
                f"{graph.path}: node {node.name!r} was compiled by provider {source[:100]!r}, not {_PROVIDER}.",
                hint="Import what the Vitis AI compiler wrote.",
            )
    return found


def _context_files(
    folder: VitisFolder, graph: OnnxGraph, contexts: Sequence[onnx.NodeProto]
) -> tuple[tuple[str, Path], ...]:
    """Return the model, which contains its compiled program or refers to its file, and all files that it refers to."""
    names = set(external_files(graph.model))
    if not contexts:
        raise ConfigurationError(
            f"{folder.folder} contains {folder.model.name} but nothing compiled from it: no .rai, no vaiml_par_0, "
            "and no EPContext node in the model.",
            hint="Compile the model first, or pass the artifact with --artifact.",
        )
    for node in contexts:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        embedded, main = (attributes[n].i if n in attributes else 1 for n in ("embed_mode", "main_context"))
        context = attributes["ep_cache_context"].s if "ep_cache_context" in attributes else b""
        # A node that is not a main context shares the file of one that is, and may have no file name.
        if embedded != 1 and (main != 0 or context):
            names.add(context.decode(errors="replace"))
    files = [(name, plain_file(folder.model.parent, name, f"{folder.model}: the model")) for name in sorted(names)]
    return ((folder.model.name, folder.model), *files)


def _boundary(folder: VitisFolder, graph: OnnxGraph, contexts: list[onnx.NodeProto]) -> Boundary | None:
    """Return the device's inputs and outputs: from the compiler's table, otherwise from the node that was compiled."""
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
                    hint="Use --onnx to pass the model that was compiled.",
                )
    return folder.boundary


def _check_boundary(part: HostPart, boundary: Boundary | None, folder: VitisFolder) -> None:
    if boundary is None:
        return
    for ours, theirs in ((part.input, boundary.inputs[0]), (part.output, boundary.outputs[0])):
        if theirs.shape and (squeezed(ours.shape) != squeezed(theirs.shape) or ours.dtype != theirs.dtype):
            raise BundleError(
                f"{folder.artifact}: the device has {theirs}, but according to the model and the checkpoint its "
                f"shape is {list(ours.shape)}.",
                hint="Pass the checkpoint and the model that the artifact was compiled from.",
            )


def _unrecognised(
    folder: VitisFolder, graph: OnnxGraph, boundary: Boundary | None, unknown: UnknownHostError
) -> BundleError:
    places = end_operators(graph) if boundary is None else host_operators(graph, boundary)
    listed = ", ".join(named(graph.nodes[place]) for place in places[:_MOST_LISTED]) or "none"
    more = f" and {len(places) - _MOST_LISTED} more" if len(places) > _MOST_LISTED else ""
    hint = (
        "Let ONNX Runtime run them with --host-on-onnxrt, or export the tower as transformers does."
        if boundary is not None
        else "Add the compiler's flexmlrt-hsi.json to the folder, which lists the device's tensors, and pass "
        "--host-on-onnxrt; or export the tower as transformers does."
    )
    return BundleError(
        f"{folder.model}: the operators around the device's part are not this family's: {unknown}. "
        f"They are: {listed}{more}.",
        hint=hint,
    )


def _matching_grid(tower: Tower, order: NDArray[np.int64], wanted: Grid | None) -> tuple[Grid, HostSplit]:
    """Return the grid with this window order, a permutation [tokens], and how its windows are ordered.

    Raises:
        BundleError: If no grid has that order.
        ConfigurationError: If several have it and none was chosen, or the chosen one has a different order.
    """
    tokens = len(order)
    if tokens * tower.merge_size**2 > MOST_PATCHES:
        raise BundleError(
            f"the model is for {tokens * tower.merge_size**2} patches; the limit is {MOST_PATCHES}.",
            hint="Compile the tower for a smaller grid.",
        )
    fitting: dict[Grid, HostSplit] = {}
    nearest, least = "none", tokens + 1
    for height in (each for each in range(1, tokens + 1) if tokens % each == 0):
        grid = Grid(1, height * tower.merge_size, tokens // height * tower.merge_size)
        # If both orders are the same it is called raster, as in the reference.
        orders = [window_order(tower.spec, [grid], grouped=grouped)[0] for grouped in (False, True)]
        differing = [int((each != order).sum()) for each in orders]
        if 0 in differing:
            fitting[grid] = HostSplit(GROUPED if differing[0] else RASTER)
        if min(differing) < least:
            nearest, least = f"{grid.h}x{grid.w}", min(differing)
    if not fitting:
        raise BundleError(
            f"no grid of {tokens} tokens has the model's window order; the nearest is {nearest}, which differs in "
            f"{least} places.",
            hint="Export the tower with transformers' window order, and compile it again.",
        )
    names = ", ".join(f"{grid.h}x{grid.w}" for grid in fitting)
    if wanted is not None:
        if wanted not in fitting:
            raise ConfigurationError(
                f"the artifact is not for grid {wanted.h}x{wanted.w}: its window order is that of {names}.",
                hint="Leave --grid out, or choose one of these.",
            )
        return wanted, fitting[wanted]
    if len(fitting) > 1:
        raise ConfigurationError(
            f"grids {names} have the same window order, so the model does not show which of them it is for.",
            hint="With --grid, choose the one that the model was compiled for.",
        )
    return next(iter(fitting.items()))


def _check_weights(part: HostPart, weights: Mapping[str, StoredTensor]) -> None:
    """Refuse an artifact whose host weights differ from the checkpoint's; weights that this lacks are not compared."""
    for name, found in part.weights.items():
        stored = weights.get(name)
        if stored is None:
            continue
        exact = stored.read()
        difference = "it has a different shape"
        if exact.shape == found.shape:
            ours, theirs = found.astype(np.float32), exact.astype(np.float32)
            if any(np.array_equal(ours, rounded.astype(np.float32)) for rounded in _roundings(theirs)):
                continue
            with np.errstate(all="ignore"):
                largest = float(np.abs(ours - theirs).max())
            if largest <= _TOLERANCE * float(np.abs(theirs).max()):
                continue
            difference = f"they differ by up to {largest:g}"
        raise BundleError(
            f"the artifact's {name} is not the one in {stored.file}: {difference}. It was compiled from "
            f"different weights.",
            hint=OTHER_CHECKPOINT,
        )


def narrowest(values: NDArray[Any]) -> NDArray[Any]:
    """Return the values in the narrowest float dtype that holds them exactly, as before an exporter widened them."""
    wide = values.astype(np.float32)
    exact = (each for each in reversed(_roundings(wide)) if np.array_equal(each.astype(np.float32), wide))
    return next(exact, wide)  # NaN equals nothing


def _roundings(values: NDArray[np.float32]) -> tuple[NDArray[Any], ...]:
    """Return the float32 values, and their roundings to the narrower dtypes of exports, the preferred last."""
    with np.errstate(all="ignore"):
        return values, values.astype(np.float16), values.astype(ml_dtypes.bfloat16)
