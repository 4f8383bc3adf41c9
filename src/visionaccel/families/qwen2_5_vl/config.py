"""Sizes of a Qwen2.5-VL vision tower, from a checkpoint's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from visionaccel.checkpoint import Checkpoint
from visionaccel.errors import CheckpointError, UnsupportedArchitectureError

__all__ = ["DEFAULTS", "VisionConfig"]

_MOST, _MOST_WINDOW = 2**20, 2**14
"""Far above every real tower's: a forged configuration must not decide how much memory the host's tables take."""

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
"""What configurations may leave out: transformers' defaults, but for the hidden size, whose default no model has."""


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """Sizes of the tower; names as in `config.json`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    rope_theta: float

    @property
    def patch_width(self) -> int:
        """Width of a row of patches."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def merged_patches(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def window_tokens(self) -> int:
        """Side of a full attention window in tokens."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @property
    def window_patches(self) -> int:
        """Patches of a full attention window."""
        return self.window_tokens**2 * self.merged_patches

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> VisionConfig:
        """The vision configuration of a checkpoint.

        Raises:
            CheckpointError: If a size is missing or impossible.
            UnsupportedArchitectureError: If the activation is not SiLU.
        """
        where = f"{checkpoint.folder}/config.json: vision_config"
        raw = checkpoint.config.get("vision_config")
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where} is missing.", hint="Pass a vision-language checkpoint.")
        values: dict[str, Any] = {**DEFAULTS, **raw}
        if values["hidden_act"] != "silu":
            raise UnsupportedArchitectureError(
                f"{where}.hidden_act is {values['hidden_act']!r}; only 'silu' is implemented.",
                hint="Pass a released Qwen2.5-VL checkpoint or a finetune of one.",
            )
        try:
            # transformers has written it in both places, and reads both.
            base = dict(values.get("rope_parameters") or {}).get("rope_theta", values.get("rope_theta", 10000.0))
            # Those of blocks that do not exist are ignored, as by the reference: a tower may be cut to fewer blocks.
            full = {_whole(index) for index in values["fullatt_block_indexes"]}.intersection(
                range(_whole(values["depth"]))
            )
            config = cls(
                fullatt_block_indexes=tuple(sorted(full)),
                rope_theta=float(base),
                **{name: _whole(values[name]) for name in cls.__slots__ if name not in _NOT_PLAIN_SIZES},
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{where} lacks a usable {error}.", hint="Pass a complete Qwen2.5-VL checkpoint."
            ) from error
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        sizes = {name: getattr(self, name) for name in self.__slots__ if name not in _NOT_PLAIN_SIZES}
        if min(sizes.values()) < 1:
            raise CheckpointError(
                f"{where}: {min(sizes, key=sizes.__getitem__)} must be positive.",
                hint="The configuration is damaged or foreign.",
            )
        rules = {
            f"no size may be over {_MOST}": max(sizes.values()) <= _MOST,
            f"windows may have no more than {_MOST_WINDOW} patches": self.window_patches <= _MOST_WINDOW,
            "hidden_size must be divisible by num_heads": self.hidden_size % self.num_heads == 0,
            "the head width must be divisible by 4": self.head_dim % 4 == 0,
            "window_size must be a multiple of patch_size * spatial_merge_size": self.window_size
            % (self.patch_size * self.spatial_merge_size)
            == 0,
            "rope_theta must be positive": 0 < self.rope_theta < math.inf,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise CheckpointError(f"{where}: {'; '.join(broken)}.", hint="The configuration is damaged or foreign.")


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"whole number where it says {value!r}")
    return value


_NOT_PLAIN_SIZES = frozenset({"fullatt_block_indexes", "rope_theta"})
