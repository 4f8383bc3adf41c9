"""Qwen3-Omni: the tower of Qwen3-VL within a thinker, with other names."""

from __future__ import annotations

from visionaccel.families.qwen3_vl import DEFAULTS, described
from visionaccel.towers import Family, TowerSpec, VisionConfiguration

_NAMES = ("merger.ln_q", "merger.mlp.0", "merger.mlp.2")


def _spec(config: VisionConfiguration) -> TowerSpec:
    entries, side = config.whole("num_position_embeddings"), config.whole("image_size") // config.whole("patch_size")
    if entries != side**2:
        raise ValueError(
            f"num_position_embeddings is {entries}, as transformers has it, but image_size means {side**2}, as vLLM "
            "has it"
        )
    return described(config, _NAMES)


FAMILY = Family(
    name="qwen3_omni",
    spec=_spec,
    config=("thinker_config", "vision_config"),
    defaults={**DEFAULTS, "image_size": 768},
    prefixes=("thinker.visual.", "visual."),
    names={f"merger_list.{{n}}.{layer}": f"deepstack.{{n}}.{layer}" for layer in ("ln_q", "mlp.0", "mlp.2")},
)
"""Checkpoints of `Qwen3OmniMoeForConditionalGeneration`."""
