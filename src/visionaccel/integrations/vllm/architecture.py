"""What this package must know of a model of vLLM's to replace its vision encoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """How vLLM's model of an architecture makes its vision tower and limits its images.

    visionaccel has one for each model that it serves. For another model, register one in the entry-point group
    `visionaccel.vllm_models`, under the name of the architecture in `config.json`, and a family in the group
    `visionaccel.families` under the same name. The model may be vLLM's, or one that another plug-in registers.

    The model must call its tower with patches [P, width] and (t, h, w) of each item, and its processor must return
    these as for vLLM's Qwen models: `pixel_values` and `image_grid_thw`, or `pixel_values_videos` and `video_grid_thw`.

    Attributes:
        model: vLLM's class as `module:Class`. The names that are needed of it are checked at the start; the class that
            is registered with vLLM may be a subclass.
        towers: Names of the classes that the model's constructor may make the tower from. It must look them up in the
            module of the model's class, or in that of one of its base classes.
        epsilon: Path of attributes from the model's configuration (`hf_config`) to what vLLM's tower adds to variances.
            An engine does not start if that is not the family's value.
        usual_epsilon: What vLLM's tower adds if the configuration has no such attribute.
        rotary_base: Base of the rotary positions in vLLM's tower, which ignores the configuration's. An engine does not
            start if that is not the family's value.
        limits_count_frames: Whether the image processor's smallest and largest size limit the pixels of all frames that
            a patch spans, instead of the pixels of the image.
    """

    model: str
    towers: tuple[str, ...]
    epsilon: tuple[str, ...] = ("rms_norm_eps",)
    usual_epsilon: float = 1e-6
    rotary_base: float = 10000.0
    limits_count_frames: bool = False
