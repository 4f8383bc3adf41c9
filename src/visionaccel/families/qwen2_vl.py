"""Qwen2-VL: full attention in every block, layer norms, a feed-forward network with QuickGELU."""

from __future__ import annotations

from visionaccel.families.parts import attention, merger, patch_embedding, sizes
from visionaccel.towers import Activation, Family, Linear, Norm, TowerSpec, VisionConfiguration

DEFAULTS = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "hidden_act": "quick_gelu",
}
"""transformers' defaults. Released configurations contain little more than the output's width, `hidden_size`."""


def _spec(config: VisionConfiguration) -> TowerSpec:
    config.require("hidden_act", "quick_gelu", why=", because vLLM ignores the entry and transformers does not")
    common = sizes(config, hidden="embed_dim")
    hidden, out = common["hidden"], config.whole("hidden_size")
    inner = hidden * config.whole("mlp_ratio")
    return TowerSpec(
        **common,
        **attention(hidden),
        out=out,
        embed=(patch_embedding(common, bias=False),),
        norm1=Norm("norm1", "layer", hidden),
        norm2=Norm("norm2", "layer", hidden),
        mlp=(Linear("mlp.fc1", hidden, inner), Activation("quick_gelu"), Linear("mlp.fc2", inner, hidden)),
        merger=merger(common, out, "layer", ("merger.ln_q", "merger.mlp.0", "merger.mlp.2")),
    )


FAMILY = Family(name="qwen2_vl", spec=_spec, defaults=DEFAULTS)
"""Checkpoints of `Qwen2VLForConditionalGeneration`."""
