"""Qwen2.5-VL: window attention in all but a few blocks, RMS norms, gated feed-forward, no learned positions."""

from __future__ import annotations

from visionaccel.errors import UnsupportedArchitectureError
from visionaccel.towers import Activation, Family, Gated, Linear, Merge, Norm, TowerSpec, VisionConfiguration

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


def _spec(config: VisionConfiguration) -> TowerSpec:
    if config["hidden_act"] != "silu":
        raise UnsupportedArchitectureError(
            f"{config.where}.hidden_act is {config['hidden_act']!r}; only 'silu' is implemented.",
            hint="Pass a released Qwen2.5-VL checkpoint or a finetune of one.",
        )
    patch, merge, channels = (config.whole(name) for name in ("patch_size", "spatial_merge_size", "in_channels"))
    temporal, hidden, depth = (config.whole(name) for name in ("temporal_patch_size", "hidden_size", "depth"))
    inner, out, side = (config.whole(name) for name in ("intermediate_size", "out_hidden_size", "window_size"))
    if min(patch, merge) < 1 or side % (patch * merge):
        raise ValueError("patch_size and spatial_merge_size must be positive, window_size must be a multiple of both")
    wide = hidden * merge**2
    return TowerSpec(
        patch=patch,
        temporal=temporal,
        channels=channels,
        merge=merge,
        hidden=hidden,
        heads=config.whole("num_heads"),
        depth=depth,
        out=out,
        embed=(Linear("patch_embed.proj", channels * temporal * patch**2, hidden, bias=False),),
        norm1=Norm("norm1", "rms", hidden),
        qkv=Linear("attn.qkv", hidden, 3 * hidden),
        proj=Linear("attn.proj", hidden, hidden),
        norm2=Norm("norm2", "rms", hidden),
        mlp=(
            Gated(
                Linear("mlp.gate_proj", hidden, inner),
                Linear("mlp.up_proj", hidden, inner),
                Linear("mlp.down_proj", inner, hidden),
                "silu",
            ),
        ),
        merger=(
            Norm("merger.ln_q", "rms", hidden),
            Merge(),
            Linear("merger.mlp.0", wide, wide),
            Activation("gelu"),
            Linear("merger.mlp.2", wide, out),
        ),
        window=side // (patch * merge),
        # Indexes of blocks that do not exist are ignored, as in the reference: a tower may be cut to fewer blocks.
        full_blocks=tuple(sorted({block for block in config.wholes("fullatt_block_indexes") if 0 <= block < depth})),
        rotary_base=config.rotary_base,
    )


FAMILY = Family(
    name="qwen2_5_vl",
    spec=_spec,
    defaults=DEFAULTS,
    names={f"blocks.{{n}}.attn.{part}_proj": f"blocks.{{n}}.attn.{part}" for part in "qkv"},
    fused={"blocks.{n}.mlp.gate_up_proj": ("blocks.{n}.mlp.gate_proj", "blocks.{n}.mlp.up_proj")},
)
"""Checkpoints of `Qwen2_5_VLForConditionalGeneration`."""
