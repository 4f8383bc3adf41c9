"""Random input for towers, and the answer of transformers, which takes seconds to import: only its users do so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.grid import as_grids, total_patches
from visionaccel.families import family_of
from visionaccel_testing.checkpoints import TINY

if TYPE_CHECKING:
    import torch


def random_patches(
    grids: list[tuple[int, int, int]], config: Mapping[str, Any] = TINY, seed: int = 0
) -> NDArray[np.float32]:
    """Random patches for grids of a tower."""
    channels = config.get("in_channels") or config["num_channels"]
    width = channels * config["temporal_patch_size"] * config["patch_size"] ** 2
    rng = np.random.default_rng(seed)
    return rng.standard_normal((total_patches(as_grids(grids)), width), dtype=np.float32)


def lowest_cosine(ours: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    """The lowest cosine of two arrays' rows."""
    return float(((ours * exact).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)).min())


def _reference_tower(folder: Path) -> torch.nn.Module:
    # By when it was written, too: pytest may give a test the folder of one that passed, with another checkpoint in it.
    return _loaded_tower(folder, tuple(file.stat().st_mtime_ns for file in sorted(folder.glob("*.safetensors"))))


def transformers_tower(architecture: str, path: tuple[str, ...] = ("vision_config",)) -> Any:
    """transformers' class of the vision tower in models of an architecture; `path` leads to its configuration."""
    import transformers

    model = getattr(transformers, architecture)
    config = model.config_class
    for key in path:
        config = config.sub_configs[key]
    return next(
        kind
        for kind in vars(sys.modules[model.__module__]).values()
        if isinstance(kind, type) and getattr(kind, "config_class", None) == config and hasattr(kind, "_from_config")
    )


@cache
def _loaded_tower(folder: Path, written: tuple[int, ...]) -> torch.nn.Module:
    import torch
    from safetensors.torch import load_file

    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint)
    (architecture,) = checkpoint.architectures
    kind = transformers_tower(architecture, family.config)
    config = kind.config_class.from_dict(dict(family.configuration(checkpoint.config, "config.json")))
    tower = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    weights = {}
    for file in folder.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            prefix = next((each for each in family.prefixes if name.startswith(each)), None)
            if prefix is not None:
                weights[name.removeprefix(prefix)] = weight.float()
    tower.load_state_dict(weights)
    return tower.eval().requires_grad_(False)


def reference(folder: Path, patches: NDArray[np.float32], grids: list[tuple[int, int, int]]) -> NDArray[np.float32]:
    """What transformers' tower, loaded and run independently of this package's backends, makes of patches."""
    import torch

    if Checkpoint(folder).architectures[0].startswith("Glm4v"):  # there, each frame of a video has its own row
        grids = [(1, h, w) for t, h, w in grids for _ in range(t)]
    output = _reference_tower(folder)(torch.from_numpy(patches.copy()), grid_thw=torch.tensor(grids), return_dict=True)
    return torch.cat([output.pooler_output, *(getattr(output, "deepstack_features", None) or ())], dim=1).numpy()
