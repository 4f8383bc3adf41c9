"""transformers' Qwen2.5-VL vision tower, loaded alone from a checkpoint."""

import torch
from safetensors import safe_open
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from visionaccel.errors import CheckpointError
from visionaccel.program import Program

__all__ = ["load_tower"]


def load_tower(program: Program, *, dtype: str, attention: str, device: str) -> torch.nn.Module:
    """The tower in evaluation mode on `device`; the language model's weights are not read.

    Args:
        program: Its configuration and where its weights lie.
        dtype: `float32` or `bfloat16`, for weights and arithmetic; rotary frequencies stay float32.
        attention: transformers' attention implementation.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: If the weights do not fit the configuration.
    """
    config = Qwen2_5_VLVisionConfig.from_dict(dict(program.config))
    config._attn_implementation = attention
    # Built on the meta device, so that nothing is allocated twice; the weights are then assigned, not copied.
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(config)
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(config)

    weights: dict[str, torch.Tensor] = {}
    for file in sorted({stored.file for stored in program.weights.values()}):
        with safe_open(file, framework="pt", device=device) as shard:
            for name, stored in program.weights.items():
                if stored.file == file:
                    weights[name] = shard.get_tensor(stored.name).to(getattr(torch, dtype))
    try:
        tower.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{program.folder}: the vision weights do not fit the configuration: {error}",
            hint="Configuration and weights are of different models.",
        ) from error
    module: torch.nn.Module = tower.to(device).eval().requires_grad_(False)
    return module
