"""The model in vLLM: Qwen2-VL's with another tower."""

from typing import ClassVar

from torch import nn
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VisionTransformer,
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY


class TinyVisionTransformer(Qwen2VisionTransformer):
    """Qwen2-VL's tower with RMS norms, and another activation in the feed-forward network."""

    def __init__(self, vision_config, **others):
        super().__init__(vision_config, **others)

        def norm():
            return RMSNorm(vision_config.width, eps=vision_config.norm_epsilon)

        for block in self.blocks:
            block.norm1, block.norm2 = norm(), norm()
            block.mlp.act = get_act_fn(vision_config.activation)
        self.merger.ln_q = norm()


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLMultiModalProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class TinyVLMForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Made in the same way as the class that it is derived from."""

    supports_mm_device_do_normalize = False
    hf_to_vllm_mapper: ClassVar = WeightsMapper(
        orig_to_new_prefix={
            "vision.patch_embedding.": "visual.patch_embed.proj.",
            "vision.layers.": "visual.blocks.",
            "vision.merger.norm.": "visual.merger.ln_q.",
            "vision.merger.up.": "visual.merger.mlp.0.",
            "vision.merger.down.": "visual.merger.mlp.2.",
            "language.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        },
        orig_to_new_substr={
            ".attention_norm.": ".norm1.",
            ".attention.qkv.": ".attn.qkv.",
            ".attention.out.": ".attn.proj.",
            ".mlp_norm.": ".norm2.",
            ".mlp.up.": ".mlp.fc1.",
            ".mlp.down.": ".mlp.fc2.",
        },
    )

    def __init__(self, *, vllm_config, prefix=""):
        nn.Module.__init__(self)
        self.model_config = vllm_config.model_config
        self.config = self.model_config.hf_config
        self.multimodal_config = self.model_config.get_multimodal_config()
        self.use_data_parallel = self.multimodal_config.mm_encoder_tp_mode == "data"
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.visual = TinyVisionTransformer(
                self.config.vision_config,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "visual"),
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["Qwen2ForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
