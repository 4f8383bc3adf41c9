"""Qwen3-Omni: the tower of Qwen3-VL within a thinker, with other names."""

from __future__ import annotations

from visionaccel.families.qwen3_vl import DEFAULTS, described
from visionaccel.towers import Family, TowerSpec, VisionConfiguration

_NAMES = ("merger.ln_q", "merger.mlp.0", "merger.mlp.2")


def _spec(config: VisionConfiguration) -> TowerSpec:
    spec, image = described(config, _NAMES), config.whole("image_size")
    config.require("apply_vit_abs_pos_embed", True, why=", because transformers ignores the entry and vLLM does not")
    entries, others = config.whole("num_position_embeddings"), (image // spec.patch) ** 2
    if entries != others:
        raise ValueError(
            f"num_position_embeddings is {entries}, which transformers uses, but image_size {image} makes {others} "
            "positions, which vLLM uses"
        )
    return spec


FAMILY = Family(
    name="qwen3_omni",
    spec=_spec,
    config=("thinker_config", "vision_config"),
    defaults={**DEFAULTS, "image_size": 768, "apply_vit_abs_pos_embed": True},
    prefixes=("thinker.visual.", "visual."),
    names={f"merger_list.{{n}}.{layer}": f"deepstack.{{n}}.{layer}" for layer in ("ln_q", "mlp.0", "mlp.2")},
)
"""Checkpoints of `Qwen3OmniMoeForConditionalGeneration`."""
