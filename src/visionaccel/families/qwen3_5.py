"""Qwen3.5, 3.6 and 3.8, dense and with experts: the tower of Qwen3-VL without deepstack levels."""

from __future__ import annotations

from visionaccel.families.qwen3_vl import DEFAULTS, described
from visionaccel.towers import Family, TowerSpec, VisionConfiguration


def _spec(config: VisionConfiguration) -> TowerSpec:
    config.require("deepstack_visual_indexes", [], why=", because transformers' tower has no deepstack levels")
    return described(config)


FAMILY = Family(name="qwen3_5", spec=_spec, defaults={**DEFAULTS, "deepstack_visual_indexes": []})
"""Checkpoints of `Qwen3_5ForConditionalGeneration` and `Qwen3_5MoeForConditionalGeneration`."""
