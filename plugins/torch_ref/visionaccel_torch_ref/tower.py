"""transformers' Qwen2.5-VL vision tower, loaded alone from a checkpoint."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from visionaccel.checkpoint import Checkpoint
from visionaccel.errors import CheckpointError
from visionaccel.families.qwen2_5_vl import WEIGHT_PREFIXES

__all__ = ["load_tower"]


def load_tower(folder: Path, *, dtype: str, attention: str, device: str) -> torch.nn.Module:
    """The tower in evaluation mode on `device`; the language model's weights are not read.

    Args:
        folder: The checkpoint folder.
        dtype: `float32` or `bfloat16`, for weights and arithmetic; rotary frequencies stay float32.
        attention: transformers' attention implementation.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: If the weights do not fit the configuration.
    """
    checkpoint = Checkpoint(folder)
    config = Qwen2_5_VLVisionConfig.from_dict(dict(checkpoint.config["vision_config"]))
    config._attn_implementation = attention
    # Built on the meta device, so that nothing is allocated twice; the weights are then assigned, not copied.
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(config)
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(config)

    weights: dict[str, torch.Tensor] = {}
    stored = checkpoint.with_prefix(WEIGHT_PREFIXES)
    for file in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(file, framework="pt", device=device) as shard:
            for name, tensor in stored.items():
                if tensor.file == file:
                    weights[name] = shard.get_tensor(tensor.name).to(getattr(torch, dtype))
    try:
        tower.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the vision weights do not fit the configuration: {error}",
            hint="Configuration and weights are of different models.",
        ) from error
    module: torch.nn.Module = tower.to(device).eval().requires_grad_(False)
    return module
