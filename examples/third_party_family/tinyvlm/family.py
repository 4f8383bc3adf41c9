"""The vision tower of TinyVLM: Qwen2-VL's with RMS norms, and another activation in the feed-forward network."""

from visionaccel.families import Family
from visionaccel.towers import Activation, Linear, Merge, Norm, TowerSpec, VisionConfiguration

DEFAULTS = {
    "patch": 14,
    "frames": 2,
    "channels": 3,
    "merge": 2,
    "expansion": 4,
    "activation": "silu",
    "norm_epsilon": 1e-6,
    "qk_norm": False,
}
"""Values that configurations may leave out."""

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Names in configurations, and the spec's."""

MODULES = ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up", "mlp.down")
"""The modules of a block with weights. Checkpoints call a block `layers.N`, the spec `blocks.N`."""


def spec(config: VisionConfiguration) -> TowerSpec:
    """Describe a tower."""
    config.require("qk_norm", False)
    activation = ACTIVATIONS[config.require("activation", *ACTIVATIONS)]
    patch, frames, channels = config.whole("patch"), config.whole("frames"), config.whole("channels")
    merge, width, out = config.whole("merge"), config.whole("width"), config.whole("output_width")
    inner, wide, epsilon = width * config.whole("expansion"), width * merge**2, config.number("norm_epsilon")
    return TowerSpec(
        patch=patch,
        temporal=frames,
        channels=channels,
        merge=merge,
        hidden=width,
        heads=config.whole("heads"),
        depth=config.whole("layers"),
        out=out,
        embed=(Linear("patch_embedding", channels * frames * patch**2, width, bias=False),),
        norm1=Norm("attention_norm", "rms", width, epsilon),
        qkv=Linear("attention.qkv", width, 3 * width),
        proj=Linear("attention.out", width, width),
        norm2=Norm("mlp_norm", "rms", width, epsilon),
        mlp=(Linear("mlp.up", width, inner), Activation(activation), Linear("mlp.down", inner, width)),
        merger=(
            Norm("merger.norm", "rms", width, epsilon),
            Merge(),
            Linear("merger.up", wide, wide),
            Activation("gelu"),
            Linear("merger.down", wide, out),
        ),
    )


FAMILY = Family(
    name="tinyvlm",
    spec=spec,
    config=("vision_config",),
    defaults=DEFAULTS,
    prefixes=("vision.",),
    names={f"layers.{{n}}.{module}": f"blocks.{{n}}.{module}" for module in MODULES},
)
