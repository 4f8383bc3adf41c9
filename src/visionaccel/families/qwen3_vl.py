"""Qwen3-VL, dense and with experts: learned positions, full attention, and deepstack levels."""

from __future__ import annotations

import math
from types import MappingProxyType

from visionaccel.families.parts import attention, merger, patch_embedding, sizes
from visionaccel.towers import Activation, Family, Linear, Norm, Positions, TowerSpec, VisionConfiguration

DEFAULTS = MappingProxyType(
    {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "hidden_act": "gelu_pytorch_tanh",
    }
)
"""Values that configurations may leave out: transformers' defaults."""

NAMES = ("merger.norm", "merger.linear_fc1", "merger.linear_fc2")


def described(config: VisionConfiguration, names: tuple[str, str, str] = NAMES) -> TowerSpec:
    """Return the description of a tower of this kind, whose merger's layers have these names.

    The norm of a deepstack level's merger acts on merged rows, that of the main merger on those of patches.
    """
    config.require("hidden_act", "gelu_pytorch_tanh")
    common = sizes(config)
    hidden, out, inner = common["hidden"], config.whole("out_hidden_size"), config.whole("intermediate_size")
    entries = config.whole("num_position_embeddings")
    side = math.isqrt(max(entries, 0))
    if side**2 != entries:
        raise ValueError(f"num_position_embeddings is {entries}; it must be a square")
    levels = config.wholes("deepstack_visual_indexes")
    if len(set(levels)) < len(levels) or not all(0 <= block < common["depth"] for block in levels):
        raise ValueError(f"deepstack_visual_indexes is {list(levels)}; it must contain blocks below depth, each once")
    norm, first, second = (name.removeprefix("merger.") for name in names)
    return TowerSpec(
        **common,
        **attention(hidden),
        out=out,
        embed=(patch_embedding(common, bias=True),),
        positions=Positions("pos_embed", side, "bilinear", align_corners=True),
        norm1=Norm("norm1", "layer", hidden),
        norm2=Norm("norm2", "layer", hidden),
        mlp=(
            Linear("mlp.linear_fc1", hidden, inner),
            Activation("gelu_tanh"),
            Linear("mlp.linear_fc2", inner, hidden),
        ),
        merger=merger(common, out, "layer", names),
        deepstack=levels,
        deepstack_merger=merger(common, out, "layer", (norm, first, second), norm_after=True) if levels else (),
    )


FAMILY = Family(
    name="qwen3_vl",
    spec=described,
    defaults=DEFAULTS,
    prefixes=("vlm.model.visual.", "model.visual.", "visual."),
    names={
        f"deepstack_merger_list.{{n}}.{layer}": f"deepstack.{{n}}.{layer}"
        for layer in ("norm", "linear_fc1", "linear_fc2")
    },
)
"""Checkpoints of `Qwen3VLForConditionalGeneration` and `Qwen3VLMoeForConditionalGeneration`, and of ColQwen3."""
