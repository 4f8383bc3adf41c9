"""Refuses towers that are not stored as plain floats: quantised weights, adapters, and tensors that have no place.

Each tensor is judged by its dtype and by what is stored next to it, and not by what the configuration says of the
checkpoint's quantisation: most quantised checkpoints keep the vision tower as it was.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from visionaccel.core.dtypes import FLOATS
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import CheckpointError

__all__ = ["plain_weights"]

_BUFFER = re.compile(r"(^|\.)rotary_(pos_)?emb\.(inv_freq|cos_cached|sin_cached)$")
"""Tables that older releases of transformers saved with the weights; they are computed from the configuration."""

_COMPANION = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|scales?|biases|scale_inv|scale_2|zero_point|absmax|quant_map|SCB|weight_format"
    r"|weight_packed|weight_shape|weight_scale\w*|input_scale|(weight|input)_global_scale)$|\.quant_state\."
)
"""What quantisers store next to a weight, or instead of it."""

_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save)(\.|$)")


def plain_weights(tensors: Mapping[str, StoredTensor], known: Container[str]) -> dict[str, StoredTensor]:
    """The weights of a tower, without buffers that are computed anyway.

    Args:
        tensors: What is stored, by its names below the checkpoint's prefix.
        known: The names that the tower has weights for.

    Raises:
        CheckpointError: If one is quantised or part of an adapter, or the tower has no place for it; the first is
            named.
    """
    found = {}
    for name, tensor in sorted(tensors.items()):
        if _BUFFER.search(name):
            continue
        if tensor.dtype not in FLOATS or (name not in known and _COMPANION.search(name)):
            raise CheckpointError(
                f"{tensor.file}: the vision tower is quantised: {tensor.name!r} is {tensor.dtype}{list(tensor.shape)}"
                f"{_format(tensor)}.",
                hint="Use an unquantised checkpoint of the same model: the towers are usually the same bytes.",
            )
        if name not in known and _ADAPTER.search(name):
            raise CheckpointError(
                f"{tensor.file}: {tensor.name!r} is part of an adapter that is not merged into the vision tower.",
                hint="Merge the adapter into the checkpoint, for example with PEFT's merge_and_unload.",
            )
        if name not in known:
            raise CheckpointError(
                f"{tensor.file}: the vision weights do not fit the configuration: it has no place for {tensor.name!r}.",
                hint="Configuration and weights are of different models.",
            )
        found[name] = tensor
    return found


def _format(tensor: StoredTensor) -> str:
    if tensor.dtype.startswith("F8"):
        return " (FP8)"
    if tensor.dtype in ("U8", "I32") and re.search(r"weight(_packed)?$", tensor.name):
        return " (packed 4-bit or 8-bit integers)"
    return ""
