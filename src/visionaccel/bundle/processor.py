"""The image processor's configuration: what turns pixels into patches, and must be the same for all who share them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from visionaccel.checkpoint import read_json

__all__ = ["PROCESSOR_FILES", "processor_digest"]

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where checkpoints keep it: in a file of its own, or since transformers 5 within the whole processor's."""

_NAMES_OF_CLASSES = frozenset(
    {"feature_extractor_type", "image_processor_type", "processor_class", "_processor_class", "transformers_version"}
)


def processor_digest(folder: Path) -> str | None:
    """Digest of the image processor's configuration in a checkpoint folder; None if there is none.

    Names of Python classes are left out: they change between releases of transformers, and the patches do not.

    Raises:
        CheckpointError: If the file is malformed.
    """
    for name in PROCESSOR_FILES:
        if not (folder / name).exists():
            continue
        config: dict[str, Any] = read_json(folder / name)
        config = config.get("image_processor", config)
        if isinstance(config, dict):
            kept = {key: value for key, value in config.items() if key not in _NAMES_OF_CLASSES}
            text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
            return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    return None
