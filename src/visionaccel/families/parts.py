"""Parts that the towers of several families have in common."""

from __future__ import annotations

from typing import Any

from visionaccel.core.tower_spec import NormKind
from visionaccel.towers import Activation, Linear, Merge, Norm, Step, VisionConfiguration


def sizes(
    config: VisionConfiguration,
    *,
    hidden: str = "hidden_size",
    heads: str = "num_heads",
    depth: str = "depth",
    channels: str = "in_channels",
) -> dict[str, Any]:
    """Return the sizes of the patches and blocks, as arguments of `TowerSpec`; the arguments are the values' names.

    Raises:
        UnsupportedArchitectureError: If the rotary frequencies do not follow from their base alone.
        ValueError: If a patch or a token has no size: other sizes are divided by theirs.
    """
    for name in ("patch_size", "spatial_merge_size"):
        if config.whole(name) < 1:
            raise ValueError(f"{name} is {config.whole(name)}; it must be positive")
    return {
        "patch": config.whole("patch_size"),
        "temporal": config.whole("temporal_patch_size"),
        "channels": config.whole(channels),
        "merge": config.whole("spatial_merge_size"),
        "hidden": config.whole(hidden),
        "heads": config.whole(heads),
        "depth": config.whole(depth),
        "rotary_base": config.rotary_base,
    }


def patch_embedding(sizes: dict[str, Any], name: str = "patch_embed.proj", *, bias: bool) -> Linear:
    """Return the linear layer that embeds patches."""
    width = sizes["channels"] * sizes["temporal"] * sizes["patch"] ** 2
    return Linear(name, width, sizes["hidden"], bias=bias)


def attention(hidden: int, *, bias: bool = True, proj_bias: bool = True) -> dict[str, Any]:
    """Return the projections of a block's attention, as arguments of `TowerSpec`."""
    return {
        "qkv": Linear("attn.qkv", hidden, 3 * hidden, bias=bias),
        "proj": Linear("attn.proj", hidden, hidden, bias=proj_bias),
    }


def merger(
    sizes: dict[str, Any], out: int, kind: NormKind, names: tuple[str, str, str], *, norm_after: bool = False
) -> tuple[Step, ...]:
    """Return a merger of two linear layers with the exact GELU between them.

    Args:
        sizes: The tower's sizes.
        out: Width of its output.
        kind: Its norm, whose epsilon is 1e-6.
        names: Names of the norm and the linear layers.
        norm_after: Whether the norm acts on merged rows, and not on those of patches.
    """
    wide = sizes["hidden"] * sizes["merge"] ** 2
    norm, first, second = names
    normed: tuple[Step, ...] = (Norm(norm, kind, sizes["hidden"]), Merge())
    if norm_after:
        normed = (Merge(), Norm(norm, kind, wide))
    return *normed, Linear(first, wide, wide), Activation("gelu"), Linear(second, wide, out)
