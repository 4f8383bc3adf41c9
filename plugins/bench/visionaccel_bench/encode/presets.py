"""Towers of released models' shapes with random weights, to measure without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionaccel.core.cache_folder import our_cache
from visionaccel.core.orphans import temporary_folder
from visionaccel.errors import ConfigurationError, SettingsError
from visionaccel_testing.checkpoints import LIVELY, QWEN2_5_VL_7B, QWEN3_VL_8B, random_checkpoint

PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2.5-vl-7b": ("qwen2_5_vl", QWEN2_5_VL_7B),
    "qwen3-vl-8b": ("qwen3_vl", QWEN3_VL_8B),
}
"""Families and vision configurations by name."""

_LISTS_OF_BLOCKS = ("fullatt_block_indexes", "deepstack_visual_indexes")

_EDITION = 1
"""Increase it when the weights change, so that older ones in a cache are not used."""


def preset_checkpoint(name: str, depth: int | None = None) -> Path:
    """Return a checkpoint of a preset's shape in bfloat16; the first call writes it into the user's cache.

    `depth` limits its blocks; those of full attention, and those that a deepstack level follows, keep their places.

    Raises:
        SettingsError: The preset is unknown, or has fewer blocks.
        ConfigurationError: It cannot be written.
    """
    if name not in PRESETS:
        raise SettingsError(f"unknown preset {name!r}.", hint=f"Choose one of: {', '.join(PRESETS)}.")
    family, config = PRESETS[name]
    blocks = config["depth"] if depth is None else depth
    if not 1 <= blocks <= config["depth"]:
        raise SettingsError(f"--depth {blocks}: {name} has {config['depth']} blocks.", hint="Pass a smaller --depth.")
    base = our_cache() / "presets"
    folder = base / f"{name}-depth{blocks}-{_EDITION}"
    if folder.is_dir():
        return folder
    kept = {key: [block for block in config[key] if block < blocks] for key in _LISTS_OF_BLOCKS if key in config}
    try:
        base.mkdir(parents=True, exist_ok=True)
        # Another process may write the same one, and this process may be killed while it writes.
        with temporary_folder(".writing-", base) as half:
            shorter = {**config, "depth": blocks, **kept}
            place = half / "checkpoint"
            written = random_checkpoint(place, shorter, family=family, dtype="bfloat16", scales=LIVELY)
            if not folder.is_dir():
                written.rename(folder)
    except OSError as error:
        raise ConfigurationError(
            f"the preset's weights cannot be written to {base}: {error}.",
            hint="Free some space, or set XDG_CACHE_HOME to a writable folder.",
        ) from error
    return folder
