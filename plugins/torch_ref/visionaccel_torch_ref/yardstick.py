"""transformers' Qwen2.5-VL vision tower, loaded alone from a checkpoint: what every other form is measured against.

It shares no arithmetic and no table with this package or the core, so that a fault of theirs cannot hide in it.
"""

from collections.abc import Sequence

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from visionaccel.core.grid import Grid
from visionaccel.core.program import Program
from visionaccel.core.tower_spec import Gated
from visionaccel.errors import ConfigurationError
from visionaccel_torch_ref.weights import WeightReader, spec_of

__all__ = ["TransformersTower"]

FAMILY = "qwen2_5_vl"


class TransformersTower:
    """The tower in evaluation mode on a device.

    Args:
        program: Its description and where its weights lie; the language model's are not read.
        dtype: For weights and arithmetic; rotary frequencies stay float32.
        attention: transformers' attention implementation, `sdpa` or `eager`.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: If the weights do not fit the description.
        ConfigurationError: If it is a tower of another family.
    """

    def __init__(self, program: Program, *, dtype: torch.dtype, attention: str, device: str) -> None:
        config = _configuration(program)
        config._attn_implementation = attention
        # Built on the meta device, so that nothing is allocated twice; the weights are then assigned, not copied.
        with torch.device("meta"):
            tower = Qwen2_5_VisionTransformerPretrainedModel(config)
        tower.rotary_pos_emb = type(tower.rotary_pos_emb)(config)
        reader = WeightReader(program, dtype, device)
        weights = {name: reader.read(name) for name in program.weights}
        for block in range(config.depth):
            for kind in ("weight", "bias"):
                parts = [f"blocks.{block}.attn.{part}.{kind}" for part in "qkv"]
                if weights.keys() >= set(parts):
                    weights[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([weights.pop(part) for part in parts])
        try:
            tower.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise reader.unfit(str(error)) from error
        self._tower: torch.nn.Module = tower.to(device).eval().requires_grad_(False)

    def __call__(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embeddings [N, out_width] in the order of the grids.

        Args:
            patches: [P, patch_width], of the tower's dtype and on its device.
            grids: The grids of the call.
        """
        triples = torch.tensor([grid.thw for grid in grids]).to(patches.device)
        embeddings: torch.Tensor = self._tower(patches, triples).pooler_output
        return embeddings


def _configuration(program: Program) -> Qwen2_5_VLVisionConfig:
    """The description in the words of transformers."""
    spec = spec_of(program)
    (mlp,) = spec.mlp if program.family == FAMILY else (None,)
    if not isinstance(mlp, Gated) or spec.window is None:
        raise ConfigurationError(
            f"torch_ref's implementation 'transformers' has no tower of family {program.family!r}.",
            hint="Use implementation fast.",
        )
    return Qwen2_5_VLVisionConfig(
        depth=spec.depth,
        hidden_size=spec.hidden,
        intermediate_size=mlp.gate.outputs,
        num_heads=spec.heads,
        in_channels=spec.channels,
        patch_size=spec.patch,
        temporal_patch_size=spec.temporal,
        spatial_merge_size=spec.merge,
        window_size=spec.window * spec.merge * spec.patch,
        out_hidden_size=spec.out,
        fullatt_block_indexes=list(spec.full_blocks),
        rope_parameters={"rope_type": "default", "rope_theta": spec.rotary_base},
    )
