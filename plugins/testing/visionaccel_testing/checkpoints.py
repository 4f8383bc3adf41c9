"""Random Qwen2.5-VL checkpoints: vision towers of any size, with weights that keep activations in a sane range."""

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

LIVELY: Mapping[str, float] = MappingProxyType(
    {
        "attn.qkv.weight": 1.4,
        "attn.qkv.bias": 2.0,
        "attn.proj.weight": 0.5,
        "attn.proj.bias": 0.4,
        "mlp.down_proj.weight": 0.6,
        "mlp.down_proj.bias": 0.4,
        "merger.mlp.0.bias": 0.4,
        "merger.mlp.2.bias": 0.4,
    }
)
"""Scales of `random_checkpoint` for deep towers. As in trained towers, attention then prefers some patches to others,
each block adds less to the residual stream than it already contains, and rounding has similar effects."""


def tower_shapes(config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Return the names (below the prefix) and shapes of the tensors of a tower with this `vision_config`."""
    return family_named("qwen2_5_vl").described(_document(config), "config.json").shapes()


def random_checkpoint(
    folder: Path,
    config: Mapping[str, Any] = TINY,
    *,
    dtype: str = "float32",
    prefix: str = "visual.",
    shards: int = 1,
    seed: int = 0,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """Write a checkpoint of a vision tower alone, with random weights, and return its folder.

    Args:
        folder: The folder to write to; made if it does not exist.
        config: The tower's `vision_config`.
        dtype: `float32`, `float16` or `bfloat16`.
        prefix: The prefix of the tensors' names.
        shards: Number of safetensors files; several have an index.
        seed: Seed of the weights.
        scales: Factors of tensors, by the ends of their names; 1 for all others.
    """
    from safetensors.numpy import save_file

    _write_config(folder, config)
    rng = np.random.default_rng(seed)
    shapes = sorted(tower_shapes(config).items())
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


def hollow_checkpoint(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a float32 checkpoint whose weights are a hole in the file, and return its folder.

    The header is real, and the zeros take no disk space: for code that reads configuration and headers only.
    """
    _write_config(folder, config)
    header, offset = {}, 0
    for name, shape in tower_shapes(config).items():
        length = 4 * math.prod(shape)
        header["visual." + name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


def _document(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": {"model_type": "qwen2_5_vl", **config},
    }


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_document(config), indent=1))


def _draw(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], scales: Mapping[str, float]
) -> NDArray[np.float32]:
    values = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name or "ln_q" in name:
        values = 1 + np.float32(0.15) * values
    elif name.endswith("bias"):
        values *= np.float32(0.05)
    else:
        values *= np.float32(1 / math.sqrt(math.prod(shape[1:])))
    values *= np.float32(next((scale for end, scale in scales.items() if name.endswith(end)), 1))
    return values
