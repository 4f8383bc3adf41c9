"""Every private name of vLLM that this package relies on.

Run on vLLM 0.32.0. The model class, its tower's constructor call, `load_weights` and `embed_multimodal` are the same in
0.28 and 0.30. The classes that this package subclasses are attributes of this module, imported on first use: it must
cost nothing in vLLM's processes that need none of them.

Two private methods can only be overridden under their own names, in `processing`: `_get_vision_info` of the processing
information, whose arguments drift between releases and pass through by keyword, and `_get_prompt_updates` of the
processor.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import ModelConfig, VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as Scheduler
    from vllm.v1.request import Request

TRIED_RELEASES = ("0.32",)
"""Releases on which this package's tests ran."""

SCHEDULERS = {
    False: "visionaccel.integrations.vllm.scheduler.ContainedScheduler",
    True: "visionaccel.integrations.vllm.scheduler.ContainedAsyncScheduler",
}
"""The scheduler in the place of vLLM's synchronous and of its asynchronous one."""

_QWEN = "vllm.model_executor.models.qwen2_5_vl"
_HOMES = {
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "ImageSize": "vllm.multimodal.parse",
    "MULTIMODAL_REGISTRY": "vllm.multimodal",
    "Qwen2_5_VLDummyInputsBuilder": _QWEN,
    "Qwen2_5_VLForConditionalGeneration": _QWEN,
    "Qwen2_5_VLMultiModalProcessor": _QWEN,
    "Qwen2_5_VLProcessingInfo": _QWEN,
    "Scheduler": "vllm.v1.core.sched.scheduler",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the adapter needs to know of the model that an engine serves.

    Attributes:
        source: Checkpoint folder or Hugging Face repository.
        revision: The repository's revision.
        architectures: Its model classes.
        multimodal: It takes images or other media.
        takes_media: At least one image or video a prompt is allowed.
        own_implementation: vLLM's own model class serves it, not another library's.
        dtype: Dtype of the language model.
        device: Device of the language model.
        vision: The vision tower's configuration, or None.
    """

    source: str
    revision: str | None
    architectures: tuple[str, ...]
    multimodal: bool
    takes_media: bool
    own_implementation: bool
    dtype: torch.dtype
    device: str
    vision: Any


def served_model(config: VllmConfig) -> ServedModel:
    """The model of an engine configuration."""
    model = config.model_config
    return ServedModel(
        source=model.model,
        revision=model.revision,
        architectures=tuple(model.architectures),
        multimodal=bool(model.is_multimodal_model),
        takes_media=takes_media(model),
        own_implementation=str(getattr(model.model_impl, "value", model.model_impl)) in ("auto", "vllm"),
        dtype=model.dtype,
        device=str(config.device_config.device),
        vision=getattr(model.hf_config, "vision_config", None),
    )


def takes_media(model: ModelConfig) -> bool:
    """Whether prompts may hold an image or a video."""
    limits = model.get_multimodal_config() if model.is_multimodal_model else None
    return limits is not None and any(limits.get_limit_per_prompt(kind) for kind in ("image", "video"))


def use_contained_scheduler(config: VllmConfig) -> bool:
    """Choose the scheduler that ends the requests whose image could not be encoded, where that can be done.

    Returns:
        Whether it was chosen. Not if the user chose another, nor if embeddings or keys leave this engine before the
        scheduler hears of a fault: then a fault must end the engine, or others would compute with it.
    """
    chosen = config.scheduler_config.scheduler_cls
    connected = [name for name in ("ec_transfer_config", "kv_transfer_config") if getattr(config, name, None)]
    if chosen is None and not connected:
        config.scheduler_config.scheduler_cls = SCHEDULERS[bool(config.scheduler_config.async_scheduling)]
        return True
    if chosen in SCHEDULERS.values():
        return True
    reason = f"With {' and '.join(connected)}," if connected else f"With the custom scheduler {chosen},"
    logger().warning("%s an image that cannot be encoded ends the engine instead of its request.", reason)
    return False


def pixel_bounds(info: Any) -> tuple[int, int]:
    """Smallest and largest area in pixels that a Qwen-VL processor gives an image, the user's options included."""
    size = dict(info.get_image_processor().size)
    given = info.ctx.get_mm_config().mm_processor_kwargs or {}
    for options in (given, given.get("images_kwargs") or {}):
        size |= {name: value for name, value in dict(options.get("size") or {}).items() if value is not None}
        for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
            if options.get(name) is not None:
                size[edge] = options[name]
    return int(size["shortest_edge"]), int(size["longest_edge"])


def convert_images(parser: Any, convert: Callable[[Any], Any]) -> None:
    """Have a data parser convert each image; embeddings and images known by their identifier pass as they are."""
    parse = parser._parse_image_data

    def parse_image_data(data: Any) -> Any:
        if data is None or isinstance(data, dict) or parser.is_embeddings(data):
            return parse(data)
        items = parse(data)
        return parse([item if item is None else convert(item) for item in items.data])

    parser._parse_image_data = parse_image_data


def refuse_videos(parser: Any, refuse: Callable[[], None]) -> None:
    """Have a data parser call `refuse`, which raises, for each prompt with a video."""
    parse = parser._parse_video_data

    def parse_video_data(data: Any) -> Any:
        if data is not None and not isinstance(data, dict) and not parser.is_embeddings(data) and len(data):
            refuse()
        return parse(data)

    parser._parse_video_data = parse_video_data


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


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """What must be known of a step until its output is back, whatever becomes of its requests meanwhile.

    Attributes:
        step: The scheduler's output, by identity.
        items: What it encodes.
        touched: Requests with media that it computes tokens of, each with the first token whose keys may be new: 0 for
            a request that was just admitted, because the prefix cache may have served it from another step in flight.
    """

    step: SchedulerOutput
    items: tuple[ScheduledItem, ...]
    touched: tuple[tuple[Request, int], ...]


def step_in_flight(scheduler: Scheduler, step: SchedulerOutput) -> StepInFlight:
    """Record a step that was just scheduled."""
    items = tuple(
        _item(scheduler.requests[name].mm_features[index])
        for name, indices in step.scheduled_encoder_inputs.items()
        for index in indices
    )
    admitted = {request.req_id for request in step.scheduled_new_reqs} | step.scheduled_cached_reqs.resumed_req_ids
    touched = tuple(
        (request, 0 if name in admitted else request.num_computed_tokens - tokens)
        for name, tokens in step.num_scheduled_tokens.items()
        if (request := scheduler.requests[name]).mm_features
    )
    return StepInFlight(step, items, touched)


def _item(feature: MultiModalFeatureSpec) -> ScheduledItem:
    data = feature.data or {}
    for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if pixels in data and grid in data:
            return ScheduledItem(feature.identifier, data[pixels].data, data[grid].data.reshape(-1, 3))
    return ScheduledItem(feature.identifier, None, None)


def requests_at_stake(
    scheduler: Scheduler, steps: Iterable[StepInFlight], identifiers: Collection[str]
) -> dict[str, list[str]]:
    """Live requests that steps in flight computed from encoder outputs of `identifiers`, and from which."""
    found: dict[str, set[str]] = {}
    for request, start in (entry for step in steps for entry in step.touched):
        if scheduler.requests.get(request.request_id) is not request or request.is_finished():
            continue
        for feature in request.mm_features:
            end = feature.mm_position.offset + feature.mm_position.length
            if feature.identifier in identifiers and start < end:
                found.setdefault(request.request_id, set()).add(feature.identifier)
    return {name: sorted(used) for name, used in found.items()}


def fail_requests(scheduler: Scheduler, names: Iterable[str]) -> list[Request]:
    """End requests with an error."""
    from vllm.v1.request import RequestStatus

    failed: list[Request] = scheduler.finish_requests(list(names), RequestStatus.FINISHED_ERROR)
    return failed


def forget_prefixes(scheduler: Scheduler) -> None:
    """Empty the prefix cache; blocks in use stay with their requests.

    All of it, because which blocks were computed from a faulty output is not recorded for requests that are gone.
    """
    manager = scheduler.kv_cache_manager
    manager.evict_blocks(set(range(manager.block_pool.num_gpu_blocks)))


def forget_encoder_output(scheduler: Scheduler, identifier: str) -> None:
    """Take an encoder output out of the scheduler's cache; requests that wait with it in hand will encode it again."""
    cache = scheduler.encoder_cache_manager
    for request in scheduler.requests.values():
        for index in sorted(cache.get_cached_input_ids(request)):
            if request.mm_features[index].identifier == identifier:
                cache.free_encoder_input(request, index)
    size = cache.freeable.pop(identifier, None)
    if size is not None:
        del cache.cached[identifier]
        del cache.num_embeds_by_hash[identifier]
        cache.num_free_slots += size


def free_in_worker(step: SchedulerOutput, identifiers: Iterable[str]) -> None:
    """Have the workers drop encoder outputs before they encode anything in this step.

    The scheduler's own list will not do: it leaves out what the same step allocates again, and a worker that still has
    the output need not encode it anew.
    """
    listed = step.free_encoder_mm_hashes
    listed.extend(identifier for identifier in identifiers if identifier not in listed)


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
