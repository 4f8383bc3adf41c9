"""Names of the tower's weights, and the forms in which checkpoints store them.

The attention's projections are one weight `attn.qkv`, or three: `attn.q`, `attn.k` and `attn.v`. Programs take either.
Gate and up are two weights; where they are stored as one, `mlp.gate_up_proj`, its halves are the two.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import CheckpointError
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.towers.signature import PATCH_KERNEL

__all__ = ["APART", "JOINT", "by_own_names", "has_every_weight", "weight_names"]

JOINT, APART = "attn.qkv", ("attn.q", "attn.k", "attn.v")
"""The projections of a block's attention: one weight and bias, or three whose rows follow each other in it."""

_LINEARS = (*APART, "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def weight_names(config: VisionConfig) -> Iterator[str]:
    """Names of all weights that a tower may have, below the prefix: the projections both as one and as three."""
    yield PATCH_KERNEL
    yield "merger.ln_q.weight"
    for linear in ("merger.mlp.0", "merger.mlp.2"):
        yield from (f"{linear}.weight", f"{linear}.bias")
    for block in range(config.depth):
        yield from (f"blocks.{block}.norm1.weight", f"blocks.{block}.norm2.weight")
        for linear in (JOINT, *_LINEARS):
            yield from (f"blocks.{block}.{linear}.weight", f"blocks.{block}.{linear}.bias")


def has_every_weight(config: VisionConfig, names: Collection[str]) -> bool:
    """Whether a tower can be computed from the weights of these names."""
    apart = {name.replace(JOINT, part): name for name in weight_names(config) if JOINT in name for part in APART}
    return all(
        name in names
        or (name in apart and apart[name] in names)
        or (JOINT in name and all(name.replace(JOINT, part) in names for part in APART))
        for name in weight_names(config)
    )


def by_own_names(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Weights by the names of this module, whatever form they are stored in; other names stay as they are.

    Args:
        stored: Tensors by their names below the checkpoint's prefix.

    Raises:
        CheckpointError: If a weight is stored in two forms.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        for own, part in _forms(name, tensor):
            joint = re.sub(r"attn\.[qkv]\.", f"{JOINT}.", own)
            if own in found or (joint != own and joint in stored):
                raise CheckpointError(
                    f"{tensor.file}: {tensor.name!r} is stored in another form too, as part of {joint!r}.",
                    hint="Make a checkpoint in which each weight is stored once.",
                )
            found[own] = part
    return found


def _forms(name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    fused = re.fullmatch(r"(blocks\.\d+\.mlp\.)gate_up_proj(\.weight|\.bias)", name)
    if fused is not None and tensor.shape and tensor.shape[0] % 2 == 0:
        half, shape = tensor.length // 2, (tensor.shape[0] // 2, *tensor.shape[1:])
        for place, own in enumerate(("gate_proj", "up_proj")):
            offset = tensor.offset + place * half
            yield f"{fused[1]}{own}{fused[2]}", replace(tensor, offset=offset, length=half, shape=shape)
    else:
        yield re.sub(r"^(blocks\.\d+\.attn\.[qkv])_proj\.", r"\1.", name), tensor
