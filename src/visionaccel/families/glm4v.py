"""GLM-4.1V, 4.5V and 4.6V: learned positions by bicubic interpolation, and a convolution that merges patches."""

from __future__ import annotations

from visionaccel.families.parts import attention, patch_embedding, sizes
from visionaccel.towers import (
    Activation,
    Family,
    Gated,
    Linear,
    Merge,
    Norm,
    Positions,
    TowerSpec,
    VisionConfiguration,
)

DEFAULTS = {
    "depth": 24,
    "hidden_size": 1536,
    "num_heads": 12,
    "out_hidden_size": 4096,
    "intermediate_size": 13696,
    "image_size": 336,
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "hidden_act": "silu",
}
"""Values that configurations may leave out: transformers' defaults."""


def _gated(prefix: str, width: int, inner: int) -> Gated:
    return Gated(
        Linear(f"{prefix}.gate_proj", width, inner, bias=False),
        Linear(f"{prefix}.up_proj", width, inner, bias=False),
        Linear(f"{prefix}.down_proj", inner, width, bias=False),
        "silu",
    )


def _spec(config: VisionConfiguration) -> TowerSpec:
    config.require("hidden_act", "silu")
    config.require("attention_bias", False, why=", because vLLM ignores the entry and transformers does not")
    common = sizes(config)
    hidden, out = common["hidden"], config.whole("out_hidden_size")
    merge, epsilon = common["merge"], config.number("rms_norm_eps")
    return TowerSpec(
        **common,
        **attention(hidden, bias=False, proj_bias=False),
        out=out,
        embed=(patch_embedding(common, bias=True), Norm("post_conv_layernorm", "rms", hidden, epsilon)),
        positions=Positions(
            "embeddings.position_embedding",
            config.whole("image_size") // common["patch"],
            "bicubic",
            align_corners=False,
        ),
        norm1=Norm("norm1", "rms", hidden, epsilon),
        norm2=Norm("norm2", "rms", hidden, epsilon),
        mlp=(_gated("mlp", hidden, out),),  # in the blocks, the inner width is that of the output
        merger=(
            Norm("post_layernorm", "rms", hidden, epsilon),
            Merge(),
            Linear("downsample", hidden * merge**2, out, kernel=merge),
            Linear("merger.proj", out, out, bias=False),
            Norm("merger.post_projection_norm", "layer", out, 1e-5),
            Activation("gelu"),
            _gated("merger", out, config.whole("intermediate_size")),
        ),
    )


FAMILY = Family(name="glm4v", spec=_spec, defaults=DEFAULTS)
"""Checkpoints of `Glm4vForConditionalGeneration` and `Glm4vMoeForConditionalGeneration`."""
