"""What this package must know of a model of vLLM's to replace its vision encoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """How vLLM's model of an architecture makes its vision tower and limits its images.

    visionaccel has one for each model that it serves. For another model, register yours in the entry-point group
    `visionaccel.vllm_models`, with an entry point that is named as the architecture in `config.json`, and a family in
    the group `visionaccel.families` under the same name. All else follows from the family and from the model's class,
    in whichever order vLLM loads the plug-in that registers it.

    The model must be a child of vLLM's multimodal models: it calls its tower with patches `pixel_values` [P, width] and
    (t, h, w) of each item, and its processor returns `image_grid_thw` or `video_grid_thw` for them.

    Attributes:
        model: vLLM's class as `module:Class`. The names that are needed of it are checked at the start; the class that
            is registered with vLLM may be a subclass.
        towers: Names of the classes that the model's constructor may make the tower from, and from no other module than
            those of its own class and base classes.
        epsilon: Path of attributes from the model's configuration (`hf_config`) to what vLLM's tower adds to variances.
            An engine does not start if that is not the family's value.
        usual_epsilon: What vLLM's tower adds if the configuration has no such attribute.
        limits_count_frames: Whether the image processor's smallest and largest size limit the pixels of all frames that
            a patch spans, instead of the pixels of the image.
    """

    model: str
    towers: tuple[str, ...]
    epsilon: tuple[str, ...] = ("rms_norm_eps",)
    usual_epsilon: float = 1e-6
    limits_count_frames: bool = False
