"""The digits readers' tokenizer, processors and untrained models: each family's own classes, only small."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideoProcessor

QUESTION = "Read the digits."

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Architecture:
    """What one family's reader consists of; sizes that all of them share are in `build_model`.

    Attributes:
        model: The model's class.
        processor: The processor's class.
        videos: The video processor's class; images are processed by Qwen2-VL's class in all families.
        vision: The tower's configuration.
        text: The language model's configuration, besides the shared sizes.
        pixels: Settings of both the image and the video processor, besides the pixel limits.
    """

    model: type[PreTrainedModel]
    processor: type[ProcessorMixin]
    videos: type[Any]
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    pixels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(self.vision["patch_size"])


_QWEN2_TEXT = {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}}
_QWEN3_TEXT = {
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [6, 5, 5],
        "rope_theta": 1e4,
    },
}
_TOWER = {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "qwen2_vl": Architecture(
            Qwen2VLForConditionalGeneration,
            Qwen2VLProcessor,
            Qwen2VLVideoProcessor,
            vision=_TOWER
            | {
                "depth": 4,
                "embed_dim": 96,
                "mlp_ratio": 2,
                "num_heads": 4,
                "hidden_size": 128,
                "hidden_act": "quick_gelu",
                "patch_size": 14,
            },
            text=_QWEN2_TEXT,
        ),
        "qwen2_5_vl": Architecture(
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLProcessor,
            Qwen2VLVideoProcessor,
            vision=_TOWER
            | {
                "depth": 4,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_heads": 4,
                "out_hidden_size": 128,
                "patch_size": 14,
                "window_size": 112,
                "fullatt_block_indexes": [1, 3],
                "tokens_per_second": 2,
            },
            text=_QWEN2_TEXT,
        ),
        "qwen3_vl": Architecture(
            Qwen3VLForConditionalGeneration,
            Qwen3VLProcessor,
            Qwen3VLVideoProcessor,
            vision=_TOWER
            | {
                "depth": 3,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_heads": 4,
                "out_hidden_size": 128,
                "patch_size": 16,
                "num_position_embeddings": 8 * 8,
                "deepstack_visual_indexes": [0, 1],
                "hidden_act": "gelu_pytorch_tanh",
            },
            text=_QWEN3_TEXT,
            pixels={"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        ),
    }
)
"""The families of which a digits reader is trained, by model type."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer with Qwen's special tokens, in which every digit is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [QUESTION, "user", "assistant", "system", "What digits are in this picture?"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=list(SPECIAL_TOKENS))
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, family: str) -> ProcessorMixin:
    """Make a family's processor, for images of 4 to 1,280 merged tokens."""
    found = ARCHITECTURES[family]
    side = 2 * found.patch
    settings = {**found.pixels, "size": {"shortest_edge": 4 * side**2, "longest_edge": 1280 * side**2}}
    return found.processor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer,
        video_processor=found.videos(**settings),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, family: str, seed: int) -> PreTrainedModel:
    """Make an untrained model whose weights are drawn with standard deviation 1/sqrt(fan_in).

    With transformers' default initialisation (0.02 everywhere), training such a narrow model makes no progress for
    minutes.
    """
    token = tokenizer.convert_tokens_to_ids
    found = ARCHITECTURES[family]
    config = found.model.config_class(
        text_config={
            "model_type": f"{family}_text",
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            **found.text,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config=dict(found.vision),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    config.architectures = [found.model.__name__]
    torch.manual_seed(seed)
    model = found.model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.normal_(0, 0.5)
            elif weight.dim() > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
    return model
