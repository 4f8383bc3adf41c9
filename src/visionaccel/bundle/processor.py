"""The image processor's configuration: what turns pixels into patches, and must be the same for all who share them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from visionaccel.checkpoint import read_json
from visionaccel.errors import ConfigurationError

__all__ = ["PROCESSOR_FILES", "processor_digest", "require_processor"]

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Where checkpoints keep it: since transformers 5 within the whole processor's file, which counts first, or alone."""

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
        config: Any = read_json(folder / name)
        if name == PROCESSOR_FILES[0]:
            config = config.get("image_processor")
        if isinstance(config, dict):
            kept = {key: value for key, value in config.items() if key not in _NAMES_OF_CLASSES}
            text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
            return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    return None


def require_processor(stated: str | None, folder: Path, bundle: Path) -> None:
    """Refuse to make patches for a bundle with another image processor than it was exported for.

    Args:
        stated: The digest in the bundle's manifest; None if it was exported without one.
        folder: The checkpoint whose processor will be used; one without is not refused here.
        bundle: The bundle's or checkpoint's folder, for the message.

    Raises:
        ConfigurationError: If the digests differ.
        CheckpointError: If the folder's configuration is malformed.
    """
    found = processor_digest(folder)
    if stated is not None and found is not None and stated != found:
        raise ConfigurationError(
            f"the encoder in {bundle} was made for another image processor than that of {folder}.",
            hint="Export a bundle from that checkpoint, or restore its preprocessor_config.json.",
        )
