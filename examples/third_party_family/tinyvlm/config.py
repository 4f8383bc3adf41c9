"""The model's configuration, for transformers and vLLM."""

from transformers import PreTrainedConfig, Qwen2VLConfig


class TinyVLMVisionConfig(PreTrainedConfig):
    """The vision tower. Code that is written for Qwen2-VL reads the same values under its own names."""

    model_type = "tinyvlm_vision"
    base_config_key = "vision_config"
    attribute_map = {  # noqa: RUF012 - as in transformers
        "depth": "layers",
        "embed_dim": "width",
        "num_heads": "heads",
        "mlp_ratio": "expansion",
        "hidden_size": "output_width",
        "patch_size": "patch",
        "temporal_patch_size": "frames",
        "in_channels": "channels",
        "spatial_merge_size": "merge",
    }

    layers: int = 12
    width: int = 768
    heads: int = 12
    output_width: int = 1024
    patch: int = 14
    frames: int = 2
    channels: int = 3
    merge: int = 2
    expansion: int = 4
    activation: str = "silu"
    norm_epsilon: float = 1e-6


class TinyVLMConfig(Qwen2VLConfig):
    """The whole model. The language model is Qwen2-VL's."""

    model_type = "tinyvlm"
    sub_configs = {**Qwen2VLConfig.sub_configs, "vision_config": TinyVLMVisionConfig}  # noqa: RUF012 - as in transformers
