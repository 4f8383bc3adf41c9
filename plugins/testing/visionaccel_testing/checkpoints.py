"""Random checkpoints of vision towers of any family and size, with weights that keep activations in a sane range."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.dtypes import FLOATS
from visionaccel.core.tower_spec import APART, JOINT
from visionaccel.families import family_named

QWEN2_5_VL_7B: Mapping[str, Any] = MappingProxyType(
    {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "in_channels": 3,
        "hidden_act": "silu",
    }
)
"""Vision configuration of Qwen2.5-VL-7B-Instruct."""

QWEN3_VL_8B: Mapping[str, Any] = MappingProxyType(
    {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
        "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
    }
)
"""Vision configuration of Qwen3-VL-8B-Instruct."""

TINY: Mapping[str, Any] = MappingProxyType(
    {
        **QWEN2_5_VL_7B,
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "out_hidden_size": 24,
        "patch_size": 4,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
)
"""A tower that runs in milliseconds and has every trait of the released ones: windows of 64 patches, full attention."""

_SMALL = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
}
_QWEN3 = {
    **_SMALL,
    "hidden_size": 32,
    "intermediate_size": 44,
    "out_hidden_size": 24,
    "num_position_embeddings": 144,
    "hidden_act": "gelu_pytorch_tanh",
}
_STACKED = {**_QWEN3, "deepstack_visual_indexes": [2, 0]}  # the levels' numbers are not in the order of their blocks

TINY_TOWERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen2_vl": {
            **_SMALL,
            "embed_dim": 32,
            "mlp_ratio": 2,
            "hidden_size": 24,
            "hidden_act": "quick_gelu",
        },
        "qwen2_5_vl": TINY,
        "qwen2_5_omni": TINY,
        "qwen3_vl": _STACKED,
        "qwen3_omni": {**_STACKED, "image_size": 48},
        "qwen3_5": _QWEN3,
        "glm4v": {
            **_SMALL,
            "hidden_size": 32,
            "intermediate_size": 96,
            "out_hidden_size": 48,
            "image_size": 36,
            "attention_bias": False,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
        },
        "dots_ocr": {
            "embed_dim": 32,
            "hidden_size": 24,
            "intermediate_size": 44,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_channels": 3,
            "patch_size": 4,
            "temporal_patch_size": 1,
            "spatial_merge_size": 2,
            "use_bias": False,
            "rms_norm_eps": 1e-5,
            "post_norm": True,
        },
    }
)
"""For each family, the configuration of a tower that runs in milliseconds and has every trait of the released ones."""

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "qwen2_vl": "Qwen2VLForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "qwen3_omni": "Qwen3OmniMoeForConditionalGeneration",
        "qwen3_5": "Qwen3_5ForConditionalGeneration",
        "glm4v": "Glm4vForConditionalGeneration",
        "dots_ocr": "DotsOCRForCausalLM",
    }
)
"""An architecture of each family."""

_STORED_APART = frozenset({"qwen2_5_omni"})
"""Families whose checkpoints store queries, keys and values as separate weights."""

_FLAT_KERNEL = frozenset({"dots_ocr"})
"""Families whose checkpoints store the patch embedding as a convolution without an axis of time."""

LIVELY: Mapping[str, float] = MappingProxyType(
    {
        "attn.qkv.weight": 1.4,
        "attn.qkv.bias": 2.0,
        "attn.proj.weight": 0.5,
        "attn.proj.bias": 0.4,
        "mlp.down_proj.weight": 0.6,
        "mlp.down_proj.bias": 0.4,
        "mlp.linear_fc2.weight": 0.6,
        "mlp.linear_fc2.bias": 0.4,
        "merger.mlp.0.bias": 0.4,
        "merger.mlp.2.bias": 0.4,
        "merger.linear_fc1.bias": 0.4,
        "merger.linear_fc2.bias": 0.4,
    }
)
"""Scales of `random_checkpoint` for deep towers. As in trained towers, attention then prefers some patches to others,
each block adds less to the residual stream than it already contains, and rounding has similar effects."""


def tower_shapes(config: Mapping[str, Any], family: str = "qwen2_5_vl") -> Mapping[str, tuple[int, ...]]:
    """Return the stored names (below the prefix) and shapes of the tensors of a tower with this configuration."""
    found = family_named(family)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, *columns) in found.described(found.with_configuration({}, config), "config.json").shapes().items():
        apart = JOINT in name and family in _STORED_APART
        names = [name.replace(JOINT, part) for part in APART] if apart else [name]
        if len(columns) == 4 and family in _FLAT_KERNEL:
            del columns[1]
        shapes |= {found.stored_name(each): (rows // len(names), *columns) for each in names}
    return shapes


def document_of(
    config: Mapping[str, Any], family: str = "qwen2_5_vl", architecture: str | None = None
) -> dict[str, Any]:
    """Return the `config.json` of a checkpoint of a tower alone."""
    named = {"model_type": family, "architectures": [architecture or ARCHITECTURES[family]]}
    return family_named(family).with_configuration(named, {"model_type": family, **config})


def random_checkpoint(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    family: str = "qwen2_5_vl",
    architecture: str | None = None,
    dtype: str = "float32",
    prefix: str | None = None,
    shards: int = 1,
    seed: int = 0,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint of a vision tower alone, with random weights, and return its folder.

    Args:
        folder: The folder to write to; made if it does not exist.
        config: The tower's configuration; by default that of `TINY_TOWERS`.
        family: The tower's family.
        architecture: The model's architecture; by default that of `ARCHITECTURES`.
        dtype: `float32`, `float16` or `bfloat16`.
        prefix: The prefix of the tensors' names; by default the last of the family's.
        shards: Number of safetensors files; several have an index.
        seed: Seed of the weights.
        scales: Factors of tensors, by the ends of their names; 1 for all others.
    """
    from safetensors.numpy import save_file

    config = TINY_TOWERS[family] if config is None else config
    prefix = family_named(family).prefixes[-1] if prefix is None else prefix
    _write_config(folder, config, family, architecture)
    rng = np.random.default_rng(seed)
    shapes = sorted(tower_shapes(config, family).items())
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = shapes[shard::shards]
        drawn = {prefix + name: _draw(rng, name, shape, scales).astype(FLOATS[dtype]) for name, shape in part}
        save_file(drawn, folder / file)
        weight_map |= dict.fromkeys(drawn, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def hollow_checkpoint(folder: Path, config: Mapping[str, Any], family: str = "qwen2_5_vl") -> Path:
    """Write a float32 checkpoint whose weights are a hole in the file, and return its folder.

    The header is real, and the zeros take no disk space: for code that reads configuration and headers only.
    """
    _write_config(folder, config, family)
    prefix = family_named(family).prefixes[-1]
    header, offset = {}, 0
    for name, shape in tower_shapes(config, family).items():
        length = 4 * math.prod(shape)
        header[prefix + name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


def _write_config(folder: Path, config: Mapping[str, Any], family: str, architecture: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(document_of(config, family, architecture), indent=1))


def _draw(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], scales: Mapping[str, float]
) -> NDArray[np.float32]:
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("bias"):
        values *= np.float32(0.05)
    elif "norm" in name or "ln_q" in name:
        values = 1 + np.float32(0.15) * values
    elif "pos" in name:
        values *= np.float32(0.5)
    else:
        values *= np.float32(1 / math.sqrt(math.prod(shape[1:])))
    values *= np.float32(next((scale for end, scale in scales.items() if name.endswith(end)), 1))
    return values
