"""What the adapter is handed of a model that vLLM serves, for tests that make no engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visionaccel.checkpoint import Checkpoint
from visionaccel.families import family_for
from visionaccel.integrations.vllm.compat.engine_config import ServedModel


def served_model(folder: str | Path, vision: Mapping[str, Any] | None = None) -> ServedModel:
    """A served checkpoint in float32 on the CPU.

    Args:
        folder: The checkpoint.
        vision: The vision configuration that vLLM resolved; the checkpoint's own by default.
    """
    stored = Checkpoint(Path(folder))
    (architecture,) = stored.architectures
    return ServedModel(
        source=str(folder),
        revision=None,
        named=architecture,
        replaces=architecture,
        multimodal=True,
        takes_media=True,
        own_implementation=True,
        dtype=torch.float32,
        device="cpu",
        vision=vision or family_for(architecture).configuration(stored.config, "config.json"),
    )
