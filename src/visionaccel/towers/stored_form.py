"""Refuses towers that are not stored as plain floats of the shapes that their description demands.

Each tensor is judged by its dtype and by what is stored next to it, and not by what the configuration says of the
checkpoint's quantisation: most quantised checkpoints keep the vision tower as it was.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from visionaccel.core.dtypes import FLOATS
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import APART, JOINT, TowerSpec
from visionaccel.errors import CheckpointError

__all__ = ["has_every_weight", "plain_weights"]

_BUFFER = re.compile(r"(^|\.)rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tables that older releases of transformers saved with the weights; they are computed from the configuration."""

_COMPANION = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|scales?|biases|scale_inv|scale_2|zero_point|absmax|quant_map|SCB|weight_format"
    r"|weight_packed|weight_shape|weight_scale\w*|input_scale|(weight|input)_global_scale)$|\.quant_state\."
)
"""What quantisers store next to a weight, or instead of it."""

_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)(\.|$)")


def plain_weights(tensors: Mapping[str, StoredTensor], spec: TowerSpec) -> dict[str, StoredTensor]:
    """The weights of a tower, without buffers that are computed anyway.

    Args:
        tensors: What is stored, by the names of the description.
        spec: The tower; its projections may be stored apart.

    Raises:
        CheckpointError: If one is quantised or part of an adapter, or the tower has no place for it, or one of another
            shape; the first is named.
    """
    shapes = dict(spec.shapes())
    for name, (rows, *columns) in spec.shapes().items():
        if JOINT in name:
            shapes |= {name.replace(JOINT, part): (rows // len(APART), *columns) for part in APART}
    found = {}
    for name, tensor in sorted(tensors.items()):
        if _BUFFER.search(name):
            continue
        wanted, given = shapes.get(name), f"{tensor.dtype}{list(tensor.shape)}"
        if tensor.dtype not in FLOATS or (wanted is None and _COMPANION.search(name)):
            raise CheckpointError(
                f"{tensor.file}: the vision tower is quantised: {tensor.name!r} is {given}{_format(tensor)}.",
                hint="Use an unquantised checkpoint of the same model: the towers are usually the same bytes.",
            )
        if wanted is None and _ADAPTER.search(name):
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r} is part of an adapter that is not merged into the vision tower.",
                hint="Merge the adapter into the checkpoint, for example with PEFT's merge_and_unload.",
            )
        if tensor.shape != wanted:
            misfit = (
                f"it has no place for {tensor.name!r}"
                if wanted is None
                else f"{tensor.name!r} is {given}, and the configuration demands {list(wanted)}"
            )
            raise CheckpointError(
                f"{tensor.file}: the vision weights do not fit the configuration: {misfit}.",
                hint="Configuration and weights are of different models.",
            )
        found[name] = tensor
    return found


def has_every_weight(spec: TowerSpec, names: Collection[str]) -> bool:
    """Whether a tower can be computed from the weights of these names."""
    return all(
        name in names or (JOINT in name and all(name.replace(JOINT, part) in names for part in APART))
        for name in spec.shapes()
    )


def _format(tensor: StoredTensor) -> str:
    if tensor.dtype.startswith("F8"):
        return " (FP8)"
    if tensor.dtype in ("U8", "I32") and re.search(r"weight(_packed)?$", tensor.name):
        return " (packed 4-bit or 8-bit integers)"
    return ""
