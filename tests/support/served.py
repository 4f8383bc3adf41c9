"""What the adapter is handed of a model that vLLM serves, for tests that make no engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visionaccel.checkpoint import Checkpoint
from visionaccel.integrations.vllm.compat.engine_config import ServedModel


def served_model(folder: str | Path, vision: Mapping[str, Any] | None = None) -> ServedModel:
    """A served Qwen2.5-VL checkpoint in float32 on the CPU.

    Args:
        folder: The checkpoint.
        vision: The vision configuration that vLLM resolved; the checkpoint's own by default.
    """
    return ServedModel(
        source=str(folder),
        revision=None,
        named="Qwen2_5_VLForConditionalGeneration",
        replaces="Qwen2_5_VLForConditionalGeneration",
        multimodal=True,
        takes_media=True,
        own_implementation=True,
        dtype=torch.float32,
        device="cpu",
        vision=vision or Checkpoint(Path(folder)).config["vision_config"],
    )
