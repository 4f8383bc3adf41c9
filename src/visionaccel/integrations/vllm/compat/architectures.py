"""The models of vLLM whose vision encoder is replaced: one row each. Nothing else in this integration names a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    Attributes:
        model: vLLM's class for it, as `module:Class`; the contract looks it up there. The class that is derived from is
            the one that vLLM has registered.
        towers: Names of the classes that it makes its vision tower from.
        vision: Names that lead from the model's configuration to the tower's.
    """

    model: str
    towers: tuple[str, ...]
    vision: tuple[str, ...]


_MODELS = "vllm.model_executor.models"

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "Qwen2_5_VLForConditionalGeneration": Architecture(
            model=f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
            towers=("Qwen2_5_VisionTransformer",),
            vision=("vision_config",),
        ),
    }
)
"""By the name under which vLLM registers the model, and a family of towers takes its checkpoints.

Architectures that vLLM maps to one of these count as it."""
