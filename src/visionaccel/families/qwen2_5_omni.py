"""Qwen2.5-Omni: the tower of Qwen2.5-VL within a thinker, with queries, keys and values stored apart."""

from __future__ import annotations

from visionaccel.families.qwen2_5_vl import DEFAULTS, described
from visionaccel.towers import Family

FAMILY = Family(
    name="qwen2_5_omni",
    spec=described,
    config=("thinker_config", "vision_config"),
    defaults=DEFAULTS,
    prefixes=("thinker.visual.", "visual."),
)
"""Checkpoints of `Qwen2_5OmniModel` and `Qwen2_5OmniForConditionalGeneration`."""
