"""Families that the project does not ship, described for tests: what third parties would write for them."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from visionaccel.checkpoint import Checkpoint
from visionaccel.towers import (
    Activation,
    Family,
    Gated,
    Linear,
    Merge,
    Norm,
    Positions,
    Step,
    Tower,
    TowerSpec,
    VisionConfiguration,
)

SIZES = {"depth": 4, "num_heads": 2, "hidden_size": 64, "patch_size": 4, "out_hidden_size": 48}
CASES = {
    "qwen2_vl": (
        Qwen2VisionTransformerPretrainedModel,
        {"depth": 4, "num_heads": 2, "embed_dim": 64, "hidden_size": 48, "patch_size": 4},
    ),
    "qwen3_vl": (
        Qwen3VLVisionModel,
        {**SIZES, "intermediate_size": 96, "num_position_embeddings": 144, "deepstack_visual_indexes": [3, 1, 2]},
    ),
    "glm4v": (Glm4vVisionModel, {**SIZES, "intermediate_size": 104, "image_size": 36}),
}
"""transformers' tower and its configuration, by the family's name."""


ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
}


def _sizes(config: VisionConfiguration, hidden: str = "hidden_size", channels: str = "in_channels") -> dict[str, int]:
    return {
        "patch": config.whole("patch_size"),
        "temporal": config.whole("temporal_patch_size"),
        "channels": config.whole(channels),
        "merge": config.whole("spatial_merge_size"),
        "hidden": config.whole(hidden),
        "heads": config.whole("num_heads"),
        "depth": config.whole("depth"),
    }


def _patches(sizes: dict[str, int], *, bias: bool) -> Linear:
    return Linear(
        "patch_embed.proj", sizes["channels"] * sizes["temporal"] * sizes["patch"] ** 2, sizes["hidden"], bias
    )


def _qwen2_vl(config: VisionConfiguration) -> TowerSpec:
    sizes, out = _sizes(config, "embed_dim"), config.whole("hidden_size")
    hidden, wide = sizes["hidden"], sizes["hidden"] * sizes["merge"] ** 2
    inner = hidden * config.whole("mlp_ratio")
    return TowerSpec(
        **sizes,
        out=out,
        embed=(_patches(sizes, bias=False),),
        norm1=Norm("norm1", "layer", hidden),
        qkv=Linear("attn.qkv", hidden, 3 * hidden),
        proj=Linear("attn.proj", hidden, hidden),
        norm2=Norm("norm2", "layer", hidden),
        mlp=(Linear("mlp.fc1", hidden, inner), Activation("quick_gelu"), Linear("mlp.fc2", inner, hidden)),
        merger=(
            Norm("merger.ln_q", "layer", hidden),
            Merge(),
            Linear("merger.mlp.0", wide, wide),
            Activation("gelu"),
            Linear("merger.mlp.2", wide, out),
        ),
        rotary_base=config.rotary_base,
    )


def _qwen3_vl(config: VisionConfiguration) -> TowerSpec:
    sizes, out, inner = _sizes(config), config.whole("out_hidden_size"), config.whole("intermediate_size")
    hidden, wide = sizes["hidden"], sizes["hidden"] * sizes["merge"] ** 2

    def merged(place: str) -> tuple[Step, ...]:
        return Linear(f"{place}linear_fc1", wide, wide), Activation("gelu"), Linear(f"{place}linear_fc2", wide, out)

    return TowerSpec(
        **sizes,
        out=out,
        embed=(_patches(sizes, bias=True),),
        norm1=Norm("norm1", "layer", hidden),
        qkv=Linear("attn.qkv", hidden, 3 * hidden),
        proj=Linear("attn.proj", hidden, hidden),
        norm2=Norm("norm2", "layer", hidden),
        mlp=(
            Linear("mlp.linear_fc1", hidden, inner),
            Activation("gelu_tanh"),
            Linear("mlp.linear_fc2", inner, hidden),
        ),
        merger=(Norm("merger.norm", "layer", hidden), Merge(), *merged("merger.")),
        positions=Positions(
            "pos_embed", int(config.whole("num_position_embeddings") ** 0.5), "bilinear", align_corners=True
        ),
        deepstack=config.wholes("deepstack_visual_indexes"),
        deepstack_merger=(Merge(), Norm("norm", "layer", wide), *merged("")),
        rotary_base=config.rotary_base,
    )


def _glm4v(config: VisionConfiguration) -> TowerSpec:
    sizes, out, inner = _sizes(config), config.whole("out_hidden_size"), config.whole("intermediate_size")
    hidden, merge, epsilon = sizes["hidden"], sizes["merge"], float(config["rms_norm_eps"])
    side = config.whole("image_size") // sizes["patch"]

    def gated(place: str, width: int, inner: int) -> Gated:
        gate, up = (Linear(f"{place}{part}_proj", width, inner, bias=False) for part in ("gate", "up"))
        return Gated(gate, up, Linear(f"{place}down_proj", inner, width, bias=False), "silu")

    return TowerSpec(
        **sizes,
        out=out,
        embed=(_patches(sizes, bias=True), Norm("post_conv_layernorm", "rms", hidden, epsilon)),
        norm1=Norm("norm1", "rms", hidden, epsilon),
        qkv=Linear("attn.qkv", hidden, 3 * hidden, bias=False),
        proj=Linear("attn.proj", hidden, hidden, bias=False),
        norm2=Norm("norm2", "rms", hidden, epsilon),
        mlp=(gated("mlp.", hidden, out),),
        merger=(
            Norm("post_layernorm", "rms", hidden, epsilon),
            Merge(),
            Linear("downsample", hidden * merge**2, out, kernel=merge),
            Linear("merger.proj", out, out, bias=False),
            Norm("merger.post_projection_norm", "layer", out, 1e-5),
            Activation("gelu"),
            gated("merger.", out, inner),
        ),
        positions=Positions("embeddings.position_embedding", side, "bicubic", align_corners=False),
        rotary_base=config.rotary_base,
    )


_LEVEL = {
    f"deepstack_merger_list.{{n}}.{part}": f"deepstack.{{n}}.{part}" for part in ("norm", "linear_fc1", "linear_fc2")
}
FAMILIES = {
    "qwen2_vl": Family("qwen2_vl", _qwen2_vl),
    "qwen3_vl": Family("qwen3_vl", _qwen3_vl, names=_LEVEL),
    "glm4v": Family("glm4v", _glm4v),
}


def described_tower(name: str, folder: Path) -> tuple[Tower, nn.Module]:
    """A tower of a family over a checkpoint in `folder`, and transformers' over the same random weights."""
    kind, stated = CASES[name]
    torch.manual_seed(0)
    config = kind.config_class(**stated)
    theirs = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval().requires_grad_(False)
    for key, parameter in theirs.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else 1.2 / parameter[0].numel() ** 0.5
        nn.init.normal_(parameter, std=1.0 if "pos" in key and parameter.ndim == 2 else scale)
        if parameter.ndim == 1 and "norm" in key and key.endswith("weight"):
            parameter.data += 1
    save_file({f"visual.{key}": value for key, value in theirs.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    checkpoint = Checkpoint(folder)
    checkpoint.config = {"architectures": [ARCHITECTURES[name]], "vision_config": checkpoint.config}
    return Tower(FAMILIES[name], checkpoint), theirs


def described_reference(
    name: str, theirs: nn.Module, patches: np.ndarray, grids: list[tuple[int, int, int]]
) -> np.ndarray:
    """What transformers' tower makes of patches, deepstack levels side by side as the language model is handed them."""
    # transformers' GLM tower takes a video as one row of its grid for each frame.
    rows = [(1, h, w) for t, h, w in grids for _ in range(t)] if name == "glm4v" else grids
    out = theirs(torch.from_numpy(patches.copy()), grid_thw=torch.tensor(rows), return_dict=True)
    return torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], dim=1).numpy()
