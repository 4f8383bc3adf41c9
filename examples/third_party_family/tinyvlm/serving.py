"""Adds the model to vLLM, and tells visionaccel how to replace its tower there."""

from visionaccel.integrations.vllm import Architecture

NAME = "TinyVLMForConditionalGeneration"

MODEL = Architecture(
    model=f"tinyvlm.model:{NAME}",
    towers=("TinyVisionTransformer",),
    epsilon=("vision_config", "norm_epsilon"),
)
"""The entry point `visionaccel.vllm_models`."""


def register() -> None:
    """The entry point `vllm.general_plugins`, which vLLM calls in each of its processes."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from tinyvlm.config import TinyVLMConfig

    AutoConfig.register("tinyvlm", TinyVLMConfig, exist_ok=True)
    if NAME not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(NAME, MODEL.model)
