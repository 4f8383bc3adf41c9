"""Tiny checkpoints with language models, processors and tokenizers, random but of the true structure, for vLLM."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from visionaccel.families import family_for
from visionaccel_testing.checkpoints import random_checkpoint

WIDTH, LAYERS = 128, 3
_TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {
    "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}  # fmt: skip


def _rope(sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}}


_QWEN2_TEXT = {**_TEXT, **_rope([4, 6, 6])}
_QWEN3_TEXT = {**_TEXT, "head_dim": 32, **_rope([6, 5, 5], mrope_interleaved=True)}
_FULL_ATTENTION = {
    "layer_types": ["full_attention"] * LAYERS, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 64,
}  # fmt: skip
"""Of Qwen3.5, whose linear attention vLLM computes on the CPU in bfloat16 only."""
_QWEN3_5_TEXT = {**_TEXT, **_FULL_ATTENTION, **_rope([4, 2, 2], mrope_interleaved=True, partial_rotary_factor=0.25)}
_GLM_TEXT = {**_TEXT, **_rope([2, 3, 3], partial_rotary_factor=0.5)}

_SMALL = {"depth": 4, "hidden_size": 64, "num_heads": 2, "out_hidden_size": WIDTH}
_QWEN2 = {"depth": 4, "embed_dim": 64, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
_WINDOWS = {**_SMALL, "intermediate_size": 92, "fullatt_block_indexes": [1, 3], "window_size": 112}
_QWEN3 = {**_SMALL, "intermediate_size": 96, "num_position_embeddings": 144}
_STACKED = {**_QWEN3, "deepstack_visual_indexes": [0, 1, 3]}
_GLM = {**_SMALL, "intermediate_size": 104, "image_size": 126}
_DOTS = {
    "embed_dim": 64, "hidden_size": WIDTH, "intermediate_size": 92, "num_hidden_layers": 4, "num_attention_heads": 2,
    "patch_size": 14, "temporal_patch_size": 1, "spatial_merge_size": 2, "num_channels": 3,
}  # fmt: skip
_AUDIO = {
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 64, "output_dim": WIDTH,
}  # fmt: skip
_AUDIO3 = {**_AUDIO, "downsample_hidden_size": 32}

_IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
_IMAGE, _VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass(frozen=True)
class Model:
    """One architecture's tiny model, and how prompts contain media.

    Attributes:
        architecture: As in `config.json`.
        vision: Configuration of the tower.
        text: Configuration of the language model.
        wrote: transformers' class, if it has another name than the architecture: of the thinker, or language model.
        ids: Special tokens by the entry of the configuration with their number.
        processor: transformers' class.
        videos: transformers' class of the video processor.
        patch: Side of a patch.
        image: A prompt's text for an image.
        video: A prompt's text for a video; empty if the model takes none.
        audio: A prompt's text for a sound; empty if the model takes none.
        metadata: Whether vLLM wants a video with its frames' times.
        named: Special tokens by the name that the tokenizer has for them.
        engine: Arguments of vLLM's engine.
    """

    architecture: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    wrote: str = ""
    ids: Mapping[str, str] = field(default_factory=lambda: _IDS)
    processor: str = "Qwen3VLProcessor"
    videos: str = "Qwen3VLVideoProcessor"
    patch: int = 16
    image: str = _IMAGE
    video: str = _VIDEO
    audio: str = ""
    metadata: bool = True
    named: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The name of the tower's family."""
        return family_for(self.architecture).name


_OMNI_NAMES = ("image", "video", "audio", "vision_bos", "vision_eos", "audio_bos", "audio_eos")


def _named(*words: str) -> dict[str, str]:
    return {f"{name}_token": word for name, word in zip(_OMNI_NAMES, words, strict=True)}


_OF_QWEN2: dict[str, Any] = {"processor": "Qwen2VLProcessor", "videos": "Qwen2VLVideoProcessor", "patch": 14}
_OF_QWEN3_5: dict[str, Any] = {"engine": {"enable_prefix_caching": False}}
_OF_GLM4V: dict[str, Any] = {
    "processor": "Glm4vProcessor",
    "videos": "Glm4vVideoProcessor",
    "patch": 14,
    "image": "<|begin_of_image|><|image|><|end_of_image|>",
    "video": "<|begin_of_video|><|video|><|end_of_video|>",
    "ids": {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    },
}
_OF_QWEN2_5_OMNI: dict[str, Any] = {
    **_OF_QWEN2,
    "wrote": "Qwen2_5OmniThinkerForConditionalGeneration",
    "processor": "Qwen2_5OmniProcessor",
    "metadata": False,
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "named": _named(
        "<|IMAGE|>", "<|VIDEO|>", "<|AUDIO|>", "<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>", "<|audio_eos|>"
    ),
    "ids": {
        "image_token_index": "<|IMAGE|>",
        "video_token_index": "<|VIDEO|>",
        "audio_token_index": "<|AUDIO|>",
        "vision_start_token_id": "<|vision_bos|>",
        "vision_end_token_id": "<|vision_eos|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
    },
}
_OF_QWEN3_OMNI: dict[str, Any] = {
    "wrote": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "processor": "Qwen3OmniMoeProcessor",
    "videos": "Qwen2VLVideoProcessor",
    "metadata": False,
    "audio": "<|audio_start|><|audio_pad|><|audio_end|>",
    "named": _named(
        "<|image_pad|>", "<|video_pad|>", "<|audio_pad|>", "<|vision_start|>", "<|vision_end|>", "<|audio_start|>",
        "<|audio_end|>",
    ),
    "ids": {
        **_IDS,
        "audio_token_id": "<|audio_pad|>",
        "audio_start_token_id": "<|audio_start|>",
        "audio_end_token_id": "<|audio_end|>",
    },
}  # fmt: skip
_OF_DOTS: dict[str, Any] = {
    **_OF_QWEN2,
    "wrote": "Qwen2ForCausalLM",
    "ids": {"image_token_id": "<|imgpad|>"},
    "image": "<|img|><|imgpad|><|endofimg|>",
    "video": "",
}
_OMNI_TOWER = {**_STACKED, "image_size": 192, "apply_vit_abs_pos_embed": True}
_QWEN3_5_EXPERTS = {**_QWEN3_5_TEXT, **_EXPERTS, "shared_expert_intermediate_size": 64}
_GLM_EXPERTS = {
    **_GLM_TEXT, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 32, "use_qk_norm": False,
}  # fmt: skip

_MODELS = (
    Model("Qwen2VLForConditionalGeneration", _QWEN2, _QWEN2_TEXT, **_OF_QWEN2, metadata=False),
    Model(
        "Qwen2_5_VLForConditionalGeneration", _WINDOWS, _QWEN2_TEXT, **{**_OF_QWEN2, "processor": "Qwen2_5_VLProcessor"}
    ),
    Model("Qwen2_5OmniModel", _WINDOWS, _QWEN2_TEXT, **_OF_QWEN2_5_OMNI),
    Model("Qwen2_5OmniForConditionalGeneration", _WINDOWS, _QWEN2_TEXT, **_OF_QWEN2_5_OMNI),
    Model("Qwen3VLForConditionalGeneration", _STACKED, _QWEN3_TEXT),
    Model("Qwen3VLMoeForConditionalGeneration", _STACKED, {**_QWEN3_TEXT, **_EXPERTS}),
    Model("Qwen3OmniMoeForConditionalGeneration", _OMNI_TOWER, {**_QWEN3_TEXT, **_EXPERTS}, **_OF_QWEN3_OMNI),
    Model("Qwen3_5ForConditionalGeneration", _QWEN3, _QWEN3_5_TEXT, **_OF_QWEN3_5),
    Model("Qwen3_5MoeForConditionalGeneration", _QWEN3, _QWEN3_5_EXPERTS, **_OF_QWEN3_5),
    Model("Glm4vForConditionalGeneration", _GLM, _GLM_TEXT, **_OF_GLM4V),
    Model("Glm4vMoeForConditionalGeneration", _GLM, _GLM_EXPERTS, **_OF_GLM4V),
    Model("DotsOCRForCausalLM", _DOTS, _TEXT, **_OF_DOTS),
)
MODELS: Mapping[str, Model] = MappingProxyType({model.architecture: model for model in _MODELS})
"""By architecture. An Omni model is its thinker, which is all that vLLM runs of it."""


def write_model(model: Model, folder: Path) -> Path:
    """Write a checkpoint in float32 and return its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = _tokenizer(model)
        _processor(model, tokenizer).save_pretrained(folder)
        _weights(model, tokenizer, folder)
    return folder


def _tokenizer(model: Model) -> Any:
    from transformers import PreTrainedTokenizerFast

    from digits_vlm.architecture import CHAT_TEMPLATE, SPECIAL_TOKENS, build_tokenizer

    tokenizer = build_tokenizer()
    words = [f"<{word}>" for word in re.findall(r"<([^<>]+)>", model.image + model.video + model.audio)]
    missing = [word for word in dict.fromkeys(words) if word not in SPECIAL_TOKENS]
    tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    if not model.named:
        return tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        extra_special_tokens=dict(model.named),
        chat_template=CHAT_TEMPLATE,
    )


def _processor(model: Model, tokenizer: Any) -> Any:
    import transformers

    glm, side, temporal = model.family == "glm4v", 2 * model.patch, model.vision.get("temporal_patch_size", 2)

    def settings(tokens: int) -> dict[str, Any]:
        area = side**2 * (temporal if glm else 1)  # GLM's limits count the frames of a patch
        found = {"patch_size": model.patch, "temporal_patch_size": temporal}
        found["size"] = {"shortest_edge": 4 * area, "longest_edge": tokens * area}
        return found | ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if model.patch == 16 else {})

    parts = {
        "image_processor": getattr(transformers, "Glm4vImageProcessor" if glm else "Qwen2VLImageProcessor")(
            **settings(100)
        ),
        "video_processor": getattr(transformers, model.videos)(**settings(400)),
        "tokenizer": tokenizer,
    }
    if model.audio:
        parts["feature_extractor"] = transformers.WhisperFeatureExtractor(feature_size=128)
    return getattr(transformers, model.processor)(**parts, chat_template=tokenizer.chat_template)


def _weights(model: Model, tokenizer: Any, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    ids = {entry: tokenizer.convert_tokens_to_ids(word) for entry, word in model.ids.items()}
    torch.manual_seed(1)
    network = _network(model, ids).eval()
    randomise(network)
    network.save_pretrained(folder)
    document, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    tensors = load_file(file)
    if model.family == "dots_ocr":  # transformers has no class of it; released checkpoints have theirs
        tower = load_file(random_checkpoint(folder / "tower", model.vision, family=model.family) / file.name)
        tensors |= tower
        code = "from vllm.transformers_utils.configs.dotsocr import DotsOCRConfig"
        (folder / "configuration_dots.py").write_text(f"{code}\n")
        document |= {"model_type": "dots_ocr", "vision_config": dict(model.vision), **ids}
        document["auto_map"] = {"AutoConfig": "configuration_dots.DotsOCRConfig"}
    elif model.audio:
        tensors = {f"thinker.{name}": weight for name, weight in tensors.items()}
        kind = document["model_type"].removesuffix("_thinker")
        document = {"model_type": kind, "dtype": "float32", "enable_audio_output": False, "thinker_config": document}
    if model.architecture == "Qwen3VLMoeForConditionalGeneration":  # transformers saves the transpose of released ones
        tensors = {name: w.mT.contiguous() if ".experts." in name else w for name, w in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**document, "architectures": [model.architecture]}, indent=1))


def _network(model: Model, ids: Mapping[str, int]) -> Any:
    import transformers

    kind = getattr(transformers, model.wrote or model.architecture)
    text = {**model.text, "vocab_size": 384}
    if model.wrote.endswith("ForCausalLM"):
        return kind(kind.config_class(**text))
    audio = {"audio_config": _AUDIO if model.family == "qwen2_5_omni" else _AUDIO3} if model.audio else {}
    return kind(kind.config_class(text_config=text, vision_config=dict(model.vision), **audio, **ids))


def randomise(network: Any) -> None:
    """Draw weights with which a language model's answers vary, and every weight of a tower matters."""
    from torch import nn

    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            norm = "norm" in name or "ln_q" in name
            nn.init.normal_(parameter, mean=1.0 if norm and name.endswith("weight") else 0.0, std=0.2)
        elif "pos_embed" in name or "position_embedding" in name or "embed_tokens" in name:
            nn.init.normal_(parameter, std=1.0)
        else:
            nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
