"""Every private name of vLLM that this package relies on.

Run on vLLM 0.32.0. The model class, its tower's constructor call, `load_weights` and `embed_multimodal` are the same in
0.28 and 0.30.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

__all__ = [
    "TRIED_RELEASES",
    "ScheduledItem",
    "append_errors",
    "fail_requests",
    "forget_encoder_output",
    "forget_prefixes",
    "holders",
    "is_multimodal",
    "logger",
    "on_engine_config",
    "register_model",
    "scheduled_items",
    "share_log_handlers",
    "swapped_tower",
    "use_contained_scheduler",
    "warn_of_untried_release",
]

TRIED_RELEASES = ("0.32",)
"""Releases on which this package's tests ran."""

SCHEDULERS = {
    False: "visionaccel.integrations.vllm.scheduler.ContainedScheduler",
    True: "visionaccel.integrations.vllm.scheduler.ContainedAsyncScheduler",
}


def logger() -> logging.Logger:
    """A logger below `vllm`, so that vLLM's handlers and levels apply in each of its processes."""
    return logging.getLogger("vllm.visionaccel")


def share_log_handlers() -> None:
    """Let the core's log lines appear among vLLM's."""
    ours, theirs = logging.getLogger("visionaccel"), logging.getLogger("vllm")
    for handler in theirs.handlers:
        if handler not in ours.handlers:
            ours.addHandler(handler)
    ours.setLevel(theirs.level)
    ours.propagate = not ours.handlers


def warn_of_untried_release() -> None:
    """Say so if the running vLLM is of a release that this package was not run on."""
    version = str(getattr(sys.modules.get("vllm"), "__version__", "unknown"))
    if not version.startswith(TRIED_RELEASES):
        logger().warning("visionaccel was not run on vLLM %s (tried: %s).", version, ", ".join(TRIED_RELEASES))


def register_model(architecture: str, model: str) -> None:
    """Register a model class, as `module:Class`, in the place of vLLM's own."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(architecture, model)


def on_engine_config(prepare: Callable[[VllmConfig], None]) -> None:
    """Call `prepare` with each configuration that `EngineArgs` builds in this process."""
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is None:  # A process that is handed its configuration: engine core, worker, registry inspection.
        return
    build = arguments.EngineArgs.create_engine_config

    @functools.wraps(build)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        config: VllmConfig = build(self, *args, **kwargs)
        prepare(config)
        return config

    arguments.EngineArgs.create_engine_config = create_engine_config


def is_multimodal(config: VllmConfig) -> bool:
    """Whether the model takes images or other media."""
    return bool(config.model_config.is_multimodal_model)


def use_contained_scheduler(config: VllmConfig) -> None:
    """Choose the scheduler that ends the requests whose image could not be encoded, unless the user chose another."""
    chosen = config.scheduler_config.scheduler_cls
    if chosen is None:
        config.scheduler_config.scheduler_cls = SCHEDULERS[bool(config.scheduler_config.async_scheduling)]
    elif chosen not in SCHEDULERS.values():
        logger().warning(
            "With the custom scheduler %s, an image that cannot be encoded ends the engine instead of its request.",
            chosen,
        )


@contextmanager
def swapped_tower(base: type, make: Callable[..., nn.Module]) -> Iterator[None]:
    """While the constructor of `base` runs, `make` makes its vision tower: nothing of the stock one is allocated."""
    module: Any = sys.modules[base.__module__]
    stock = module.Qwen2_5_VisionTransformer
    module.Qwen2_5_VisionTransformer = make
    try:
        yield
    finally:
        module.Qwen2_5_VisionTransformer = stock


@dataclass(frozen=True, slots=True)
class ScheduledItem:
    """An image or video that a step encodes.

    Attributes:
        identifier: Its key in the encoder cache.
        pixels: Pixel values [P, patch_width] as the worker gets them; None if this process does not hold them.
        grid: Its (t, h, w).
    """

    identifier: str
    pixels: Any
    grid: Any


def scheduled_items(scheduler: Scheduler, step: SchedulerOutput) -> list[ScheduledItem]:
    """What a step encodes; to be called before any of its requests can go away."""
    return [
        _item(scheduler.requests[request].mm_features[index])
        for request, indices in step.scheduled_encoder_inputs.items()
        for index in indices
    ]


def _item(feature: MultiModalFeatureSpec) -> ScheduledItem:
    data = feature.data or {}
    for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if pixels in data and grid in data:
            return ScheduledItem(feature.identifier, data[pixels].data, data[grid].data.reshape(-1, 3))
    return ScheduledItem(feature.identifier, None, None)


def holders(scheduler: Scheduler, identifiers: Collection[str]) -> dict[Request, list[str]]:
    """Live requests that have used, or are about to use, encoder outputs of `identifiers`, and which of them."""
    found: dict[Request, list[str]] = {}
    for request in scheduler.requests.values():
        held = scheduler.encoder_cache_manager.get_cached_input_ids(request)
        used = [
            feature.identifier
            for index, feature in enumerate(request.mm_features)
            if feature.identifier in identifiers
            and (index in held or feature.mm_position.offset < request.num_computed_tokens)
        ]
        if used and not request.is_finished():
            found[request] = used
    return found


def fail_requests(scheduler: Scheduler, requests: Iterable[Request]) -> list[Request]:
    """End requests with an error."""
    from vllm.v1.request import RequestStatus

    names = [request.request_id for request in requests]
    failed: list[Request] = scheduler.finish_requests(names, RequestStatus.FINISHED_ERROR)
    return failed


def forget_prefixes(scheduler: Scheduler) -> None:
    """Empty the prefix cache; blocks in use stay with their requests.

    All of it, because which blocks were computed from a faulty output is not recorded for requests that are gone.
    """
    manager = scheduler.kv_cache_manager
    manager.evict_blocks(set(range(manager.block_pool.num_gpu_blocks)))


def forget_encoder_output(scheduler: Scheduler, identifier: str) -> None:
    """Drop an encoder output that nobody holds from the scheduler's cache; the worker drops it with the next step."""
    cache = scheduler.encoder_cache_manager
    size = cache.freeable.pop(identifier, None)
    if size is not None:
        del cache.cached[identifier]
        del cache.num_embeds_by_hash[identifier]
        cache.freed.append(identifier)
        cache.num_free_slots += size


def append_errors(outputs: dict[int, Any], failed: Iterable[Request]) -> None:
    """Add the answer of each failed request to a step's outputs, by client."""
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    for request in failed:
        answer = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(answer)
