"""dots.ocr: patches of one frame, RMS norms also after the patch embedding and the blocks, and no biases in them."""

from __future__ import annotations

from visionaccel.families.parts import attention, merger, patch_embedding, sizes
from visionaccel.towers import Family, Gated, Linear, Norm, TowerSpec, VisionConfiguration

DEFAULTS = {
    "embed_dim": 1536,
    "hidden_size": 1536,
    "intermediate_size": 4224,
    "num_hidden_layers": 42,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "rms_norm_eps": 1e-5,
    "use_bias": False,
    "post_norm": True,
    "is_causal": False,
}
"""Values that configurations may leave out: the defaults of the model's own configuration, and of vLLM's."""


def _spec(config: VisionConfiguration) -> TowerSpec:
    config.require("temporal_patch_size", 1)
    config.require("post_norm", True)
    config.require("is_causal", False)
    common = sizes(
        config, hidden="embed_dim", heads="num_attention_heads", depth="num_hidden_layers", channels="num_channels"
    )
    hidden, inner, out = common["hidden"], config.whole("intermediate_size"), config.whole("hidden_size")
    epsilon, bias = config.number("rms_norm_eps"), config.flag("use_bias")
    return TowerSpec(
        **common,
        **attention(hidden, bias=bias, proj_bias=bias),
        out=out,
        embed=(
            patch_embedding(common, "patch_embed.patchifier.proj", bias=True),
            Norm("patch_embed.patchifier.norm", "rms", hidden, epsilon),
        ),
        norm1=Norm("norm1", "rms", hidden, epsilon),
        norm2=Norm("norm2", "rms", hidden, epsilon),
        mlp=(
            Gated(
                Linear("mlp.fc1", hidden, inner, bias=bias),
                Linear("mlp.fc3", hidden, inner, bias=bias),
                Linear("mlp.fc2", inner, hidden, bias=bias),
                "silu",
            ),
        ),
        merger=(
            Norm("post_trunk_norm", "rms", hidden, epsilon),
            *merger(common, out, "layer", ("merger.ln_q", "merger.mlp.0", "merger.mlp.2")),
        ),
    )


FAMILY = Family(name="dots_ocr", spec=_spec, defaults=DEFAULTS, prefixes=("vision_tower.",))
"""Checkpoints of `DotsOCRForCausalLM`."""
