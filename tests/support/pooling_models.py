"""Tiny checkpoints of the pooling models that vLLM makes from Qwen-VL models, with the names and weights of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from whole_models import MODELS, WIDTH, Model, write_model

_DIMENSIONS = 16


@dataclass(frozen=True)
class Pooling:
    """One pooling model: how its checkpoints differ from those of the model that it is made from, and what is asked.

    Attributes:
        base: The architecture of that model.
        task: `embed`, `token_embed` or `score`, as vLLM calls it.
        config: Changed entries of `config.json`.
        names: Prefixes of the tensors' names: what replaces each, or None if it does not have these tensors.
        tensors: Shapes of the tensors that it has besides.
        tokens: Words that are one token each.
        engine: Arguments of vLLM's engine.
        scores: Whether it is asked for scores. Users of jina-embeddings-v4 pool the embeddings of tokens themselves.
        chunked: Whether vLLM computes long prompts in several steps.
    """

    base: str
    task: str
    config: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str | None] = field(default_factory=dict)
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    scores: bool = True
    chunked: bool = True

    @property
    def model(self) -> Model:
        """The model that it is made from."""
        return MODELS[self.base]

    @property
    def architecture(self) -> str:
        """The architecture under which vLLM serves it."""
        told = {"architectures": [self.base], **self.config, **self.engine.get("hf_overrides", {})}
        return str(told["architectures"][0])


_QWEN2, _QWEN2_5 = "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
_QWEN3, _QWEN3_5 = "Qwen3VLForConditionalGeneration", "Qwen3_5ForConditionalGeneration"
_RERANKER = {
    "architectures": ["Qwen3VLForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}
_UNPREFIXED = {"model.visual.": "visual.", "model.language_model.": "language_model.", "lm_head.": None}

POOLING: Mapping[str, Pooling] = MappingProxyType(
    {
        "Qwen3-VL-Embedding": Pooling(_QWEN3, "embed"),
        "Qwen3-VL-Reranker": Pooling(_QWEN3, "score", tokens=("no", "yes"), engine={"hf_overrides": _RERANKER}),
        "GME and DSE": Pooling(_QWEN2, "embed"),
        "jina-embeddings-v4": Pooling(
            _QWEN2_5,
            "token_embed",
            engine={"pooler_config": {"task": "token_embed", "use_activation": False}},
            scores=False,
        ),
        "jina-reranker-m0": Pooling(
            _QWEN2,
            "score",
            config={"architectures": ["JinaVLForRanking"], "num_labels": 1},
            tensors={
                "score.0.weight": (WIDTH, WIDTH),
                "score.0.bias": (WIDTH,),
                "score.2.weight": (1, WIDTH),
                "score.2.bias": (1,),
            },
        ),
        "ColQwen3": Pooling(
            _QWEN3,
            "token_embed",
            config={"architectures": ["ColQwen3"], "model_type": "colqwen3", "embed_dim": _DIMENSIONS},
            names={"": "vlm."},
            tensors={"embedding_proj_layer.weight": (_DIMENSIONS, WIDTH)},
            chunked=False,
        ),
        "OpsColQwen3": Pooling(
            _QWEN3,
            "token_embed",
            config={"architectures": ["OpsColQwen3Model"], "model_type": "ops_colqwen3", "dims": _DIMENSIONS},
            names=_UNPREFIXED,
            tensors={"custom_text_proj.weight": (_DIMENSIONS, WIDTH)},
            chunked=False,
        ),
        "nemotron-colembed": Pooling(
            _QWEN3,
            "token_embed",
            config={"architectures": ["Qwen3VLNemotronEmbedModel"], "model_type": "qwen3_vl_nemotron_embed"},
            chunked=False,
        ),
        "ColQwen3.5": Pooling(
            _QWEN3_5,
            "token_embed",
            config={"architectures": ["ColQwen3_5"], "dim": _DIMENSIONS, "retrieval_attention_contract": "causal"},
            names=_UNPREFIXED,
            tensors={"custom_text_proj.weight": (_DIMENSIONS, WIDTH), "custom_text_proj.bias": (_DIMENSIONS,)},
            chunked=False,
        ),
    }
)
"""By the name under which it is known."""


def write_pooling_model(pooling: Pooling, folder: Path) -> Path:
    """Write a checkpoint in float32 and return its folder."""
    import torch
    from safetensors.torch import load_file, save_file

    write_model(pooling.model, folder)
    config, file = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | pooling.config, indent=1))
    tensors = {}
    for name, tensor in load_file(file).items():
        prefix = next((each for each in pooling.names if name.startswith(each)), "")
        put = pooling.names.get(prefix, prefix)
        if put is not None:
            tensors[put + name.removeprefix(prefix)] = tensor
    drawing = torch.Generator().manual_seed(2)
    for name, shape in pooling.tensors.items():
        tensors[name] = torch.randn(shape, generator=drawing) / shape[-1] ** 0.5
    save_file(tensors, file, {"format": "pt"})
    if pooling.tokens:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(pooling.tokens))
        tokenizer.save_pretrained(folder)
    return folder
