"""vLLM's scheduler classes and their internals: what a step encodes and computes, and how a request ends in error."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase as ECConnectorBase
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorMetadata as ECConnectorMetadata
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole as ECConnectorRole
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.sched.async_scheduler import AsyncScheduler as AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler as Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request as Request
from vllm.v1.request import RequestStatus as RequestStatus

from visionaccel.integrations.vllm.compat.serving import request_error, takes_request_errors


def encoder_cache_holders(scheduler: Scheduler, identifier: str) -> Collection[str] | None:
    """Return the requests that hold an encoder output in a scheduler's encoder cache; None if it is not there."""
    holders: Collection[str] | None = scheduler.encoder_cache_manager.cached.get(identifier)
    return holders


def shows_encoder_cache(scheduler: Scheduler) -> bool:
    """Return whether a scheduler's encoder cache has vLLM's own type, with the requests that hold each output."""
    return isinstance(getattr(scheduler.encoder_cache_manager, "cached", None), dict)


@dataclass(frozen=True, slots=True)
class ScheduledItem:
    """An image or video of a request."""

    identifier: str  # its key in the encoder cache
    pixels: Any  # [P, patch_width]; None if this process does not have them
    grid: Any  # (t, h, w)


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step whose output has not arrived; its requests may be aborted or preempted before that.

    `touched` are the requests with media for which it computes tokens, each with the first token whose keys may be new.
    That is 0 for a request that was just admitted, because its prefix may come from another step in flight.
    """

    step: SchedulerOutput
    began: float  # when scheduling began, on the monotonic clock
    items: tuple[ScheduledItem, ...]  # that it encodes
    touched: tuple[tuple[Request, int], ...]


def step_in_flight(scheduler: Scheduler, step: SchedulerOutput, began: float) -> StepInFlight:
    """Record a step that was just scheduled."""
    items = tuple(
        scheduled_item(scheduler.requests[name].mm_features[index])
        for name, indices in step.scheduled_encoder_inputs.items()
        for index in indices
    )
    admitted = {request.req_id for request in step.scheduled_new_reqs} | step.scheduled_cached_reqs.resumed_req_ids
    touched = tuple(
        (request, 0 if name in admitted else request.num_computed_tokens - tokens)
        for name, tokens in step.num_scheduled_tokens.items()
        if (request := scheduler.requests[name]).mm_features
    )
    return StepInFlight(step, began, items, touched)


def scheduled_item(feature: MultiModalFeatureSpec) -> ScheduledItem:
    """Return what is known of an image or video here."""
    data = feature.data or {}
    for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if pixels in data and grid in data:
            return ScheduledItem(feature.identifier, data[pixels].data, data[grid].data.reshape(-1, 3))
    return ScheduledItem(feature.identifier, None, None)


def requests_at_stake(
    scheduler: Scheduler, steps: Iterable[StepInFlight], identifiers: Collection[str]
) -> dict[str, set[str]]:
    """Running requests that steps in flight computed from these encoder outputs, each with those that it used."""
    found: dict[str, set[str]] = {}
    for request, start in (entry for step in steps for entry in step.touched):
        if scheduler.requests.get(request.request_id) is not request or request.is_finished():
            continue
        for feature in request.mm_features:
            end = feature.mm_position.offset + feature.mm_position.length
            if feature.identifier in identifiers and start < end:
                found.setdefault(request.request_id, set()).add(feature.identifier)
    return found


def forget_prefixes(scheduler: Scheduler) -> None:
    """Empty the prefix cache, because it does not record which blocks an ended request computed from a faulty output.

    Blocks in use stay with their requests.
    """
    manager = scheduler.kv_cache_manager
    manager.evict_blocks(set(range(manager.block_pool.num_gpu_blocks)))


def forget_encoder_output(scheduler: Scheduler, identifier: str) -> None:
    """Remove an encoder output from the scheduler's cache; it is encoded again for requests that need it."""
    cache = scheduler.encoder_cache_manager
    for request in scheduler.requests.values():
        for index in sorted(cache.get_cached_input_ids(request)):
            if request.mm_features[index].identifier == identifier:
                cache.free_encoder_input(request, index)
    size = cache.freeable.pop(identifier, None)
    if size is not None:
        del cache.cached[identifier]
        getattr(cache, "num_embeds_by_hash", {}).pop(identifier, None)  # from vLLM 0.31 on
        cache.num_free_slots += size


def recompute_all(scheduler: Scheduler) -> set[str]:
    """Empty the KV and encoder caches, as vLLM does for new weights, and compute running requests from the beginning.

    Returns the identifiers of the encoder outputs, which workers must drop.
    """
    identifiers = set(scheduler.encoder_cache_manager.cached) if shows_encoder_cache(scheduler) else set()
    try:
        scheduler.reset_prefix_cache(reset_running_requests=True)
    except (TypeError, RuntimeError):  # not in this release, or the KV cache is shared: blocks in use stay
        forget_prefixes(scheduler)
        for identifier in identifiers:
            forget_encoder_output(scheduler, identifier)
        return identifiers
    scheduler.encoder_cache_manager.reset()
    return identifiers


def append_errors(outputs: dict[int, Any], failed: Iterable[tuple[Request, str]]) -> None:
    """Add failed requests to a step's outputs, with the reason as stop reason and, if vLLM supports it, as error."""
    for request, reason in failed:
        answer = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            stop_reason=reason,
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        if takes_request_errors():
            answer.error = request_error(reason)
        if request.pooling_params is not None:  # without a result, vLLM's output processor takes it for a completion
            answer.pooling_output = torch.empty(0)
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(answer)
