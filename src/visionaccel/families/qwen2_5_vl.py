"""Qwen2.5-VL: window attention in all but a few blocks, RMS norms, gated feed-forward, no learned positions."""

from __future__ import annotations

from visionaccel.families.parts import attention, merger, patch_embedding, sizes
from visionaccel.towers import Family, Gated, Linear, Norm, TowerSpec, VisionConfiguration

DEFAULTS = {
    "depth": 32,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "hidden_act": "silu",
}
"""Values that configurations may leave out: transformers' defaults. No model has the default `hidden_size`."""


def described(config: VisionConfiguration) -> TowerSpec:
    """Return the description of a tower of this kind."""
    config.require("hidden_act", "silu")
    common = sizes(config)
    token, side, depth = common["patch"] * common["merge"], config.whole("window_size"), common["depth"]
    hidden, inner, out = common["hidden"], config.whole("intermediate_size"), config.whole("out_hidden_size")
    if side % token:
        raise ValueError(f"window_size is {side}; it must be a multiple of patch_size * spatial_merge_size, {token}")
    return TowerSpec(
        **common,
        **attention(hidden),
        out=out,
        embed=(patch_embedding(common, bias=False),),
        norm1=Norm("norm1", "rms", hidden),
        norm2=Norm("norm2", "rms", hidden),
        mlp=(
            Gated(
                Linear("mlp.gate_proj", hidden, inner),
                Linear("mlp.up_proj", hidden, inner),
                Linear("mlp.down_proj", inner, hidden),
                "silu",
            ),
        ),
        merger=merger(common, out, "rms", ("merger.ln_q", "merger.mlp.0", "merger.mlp.2")),
        window=side // token,
        # Indexes of blocks that do not exist are ignored, as in the reference: a tower may be cut to fewer blocks.
        full_blocks=tuple(sorted({block for block in config.wholes("fullatt_block_indexes") if 0 <= block < depth})),
    )


FAMILY = Family(
    name="qwen2_5_vl",
    spec=described,
    defaults=DEFAULTS,
    names={f"blocks.{{n}}.attn.{part}_proj": f"blocks.{{n}}.attn.{part}" for part in "qkv"},
    fused={"blocks.{n}.mlp.gate_up_proj": ("blocks.{n}.mlp.gate_proj", "blocks.{n}.mlp.up_proj")},
)
"""Checkpoints of `Qwen2_5_VLForConditionalGeneration`."""
