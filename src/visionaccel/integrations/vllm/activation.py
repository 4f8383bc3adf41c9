"""Turns the environment's wish into a replaced vision tower, or into a refusal to start."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from visionaccel.backends import AUTO, default_registry
from visionaccel.errors import ConfigurationError
from visionaccel.families import supported_architectures
from visionaccel.integrations.vllm import compat, faults
from visionaccel.settings import load_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["activate"]

MODELS = {"Qwen2_5_VLForConditionalGeneration": "visionaccel.integrations.vllm.model:AcceleratedQwen25VL"}
"""Architectures and the model classes that replace vLLM's, as vLLM resolves them lazily."""


@cache
def activate() -> None:
    """Check what can be checked without a device and register the model classes. Imports no torch; runs once.

    Raises:
        ConfigurationError: If a setting is invalid or a named backend is not installed.
    """
    compat.share_log_handlers()
    settings = load_settings()
    for name in (settings.backend, settings.fallback):
        if name not in (None, AUTO):
            default_registry().entry(name)
    compat.warn_of_untried_release()
    for architecture, model in MODELS.items():
        compat.register_model(architecture, model)
    compat.on_engine_config(_prepare)


def _prepare(config: VllmConfig) -> None:
    """Called with each engine configuration that vLLM builds: refuse models without a replaced tower.

    Raises:
        ConfigurationError: If the model has a vision encoder that no family implements.
    """
    architectures = tuple(config.model_config.architectures)
    if supported_architectures().intersection(architectures):
        faults.make_board()
        compat.use_contained_scheduler(config)
        return
    named = ", ".join(architectures)
    if compat.is_multimodal(config):
        raise ConfigurationError(
            f"VISIONACCEL_BACKEND is set, but the vision encoder of {named} is not implemented.",
            hint=f"Unset it to serve this model with vLLM's own encoder. Implemented: "
            f"{', '.join(sorted(supported_architectures()))}.",
        )
    compat.logger().warning("VISIONACCEL_BACKEND has no effect: %s has no vision encoder.", named)
