"""Random input for towers, and the answer of transformers, which takes seconds to import: only its users do so."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.grid import as_grids, total_patches
from visionaccel_testing.checkpoints import TINY

if TYPE_CHECKING:
    import torch


def random_patches(
    grids: list[tuple[int, int, int]], config: Mapping[str, Any] = TINY, seed: int = 0
) -> NDArray[np.float32]:
    """Random patches for grids of a tower."""
    width = config["in_channels"] * config["temporal_patch_size"] * config["patch_size"] ** 2
    rng = np.random.default_rng(seed)
    return rng.standard_normal((total_patches(as_grids(grids)), width), dtype=np.float32)


def lowest_cosine(ours: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """The lowest cosine of two arrays' rows."""
    return float(((ours * exact).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)).min())


def _reference_tower(folder: Path) -> torch.nn.Module:
    # By when it was written, too: pytest may give a test the folder of one that passed, with another checkpoint in it.
    return _loaded_tower(folder, tuple(file.stat().st_mtime_ns for file in sorted(folder.glob("*.safetensors"))))


@cache
def _loaded_tower(folder: Path, written: tuple[int, ...]) -> torch.nn.Module:
    from safetensors.torch import load_file
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    checkpoint = Checkpoint(folder)
    config = Qwen2_5_VLVisionConfig.from_dict(dict(checkpoint.config["vision_config"]))
    config._attn_implementation = "eager"
    tower = Qwen2_5_VisionTransformerPretrainedModel(config)
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= {name.partition("visual.")[2]: w.float() for name, w in load_file(file).items() if "visual." in name}
    tower.load_state_dict(weights)
    return tower.eval().requires_grad_(False)


def reference(folder: Path, patches: NDArray[np.float32], grids: list[tuple[int, int, int]]) -> NDArray[np.float32]:
    """What transformers' tower, loaded and run independently of this package's backends, makes of patches."""
    import torch

    output = _reference_tower(folder)(torch.from_numpy(patches.copy()), torch.tensor(grids))
    return output.pooler_output.numpy()
