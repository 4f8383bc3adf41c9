"""vLLM's real scheduler, driving a worker that is modelled by what depends on what: no model, no device.

The self-test of the pipelined mode plays requests on it, and so do the tests of this package.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

GOOD, TAINTED = 7, 13
"""The token of an answer that was computed from right encoder outputs only, and of another."""

_BLOCK, _BLOCKS = 8, 24
"""Tokens in a block of the key-value cache, and blocks: little enough that requests preempt one another."""

_ANSWER = 3
_START, _PLACE, _TEXT = [1, 2], 12, 30
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a modelled prompt: vLLM's key of its content, patches, (t, h, w), and places that it takes there."""

    identifier: str
    pixels: torch.Tensor
    grid: tuple[int, int, int]
    tokens: int


@dataclass
class ModelledWorker:
    """What a worker computes from what. Like vLLM's newer runner, it does not encode again what it still holds."""

    outputs: dict[str, bool] = field(
        default_factory=dict
    )  # the encoder outputs that it holds, and whether each is right
    tainted: set[tuple[int, int]] = field(default_factory=set)  # (block, slot) of keys computed from a wrong one
    encoded: int = 0  # how many images it was to encode itself

    def run(self, scheduler: Scheduler, step: SchedulerOutput) -> Any:
        """Compute a step, and answer what vLLM's worker would."""
        from vllm.v1.outputs import ModelRunnerOutput

        for identifier in step.free_encoder_mm_hashes:
            self.outputs.pop(identifier, None)
        for identifier, rows in getattr(step.ec_connector_metadata, "rows", {}).items():
            self.outputs[identifier] = self.is_right(identifier, rows)
        for name, indices in step.scheduled_encoder_inputs.items():
            for index in indices:
                identifier = scheduler.requests[name].mm_features[index].identifier
                self.encoded += 1
                if identifier not in self.outputs:
                    self.outputs[identifier] = self.encode(identifier)
        names = list(step.num_scheduled_tokens)
        sampled = [self._compute(scheduler, name, step.num_scheduled_tokens[name]) for name in names]
        places = {name: i for i, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=sampled)

    def is_right(self, identifier: str, rows: Any) -> bool:  # noqa: ARG002
        """Whether an embedding that came through the EC connector is that image's."""
        return True

    def encode(self, identifier: str) -> bool:  # noqa: ARG002
        """Encode an image in the step; whether that went well."""
        return True

    def _compute(self, scheduler: Scheduler, name: str, count: int) -> list[int]:
        request = scheduler.requests[name]
        table = scheduler.kv_cache_manager.get_block_ids(name)[0]
        start = request.num_computed_tokens - count
        slots = [(table[p // _BLOCK], p % _BLOCK) for p in range(start + count)]
        tainted = any(slot in self.tainted for slot in slots[:start])
        for position, slot in enumerate(slots[start:], start):
            for feature in request.mm_features:
                place = feature.mm_position
                if place.offset <= position < place.offset + place.length:
                    tainted |= not self.outputs[feature.identifier]
            (self.tainted.add if tainted else self.tainted.discard)(slot)
        finished_prompt = start + count >= request.num_prompt_tokens
        return [TAINTED if tainted else GOOD] if finished_prompt else []


class ModelledEngine:
    """A scheduler and a worker, with as many steps in flight as vLLM has with that scheduler."""

    def __init__(self, scheduler: Scheduler, worker: ModelledWorker) -> None:
        self.scheduler, self.worker = scheduler, worker
        self.depth = 2 if any("Async" in base.__name__ for base in type(scheduler).__mro__) else 1
        self.queue: deque[tuple[SchedulerOutput, Any]] = deque()
        self.answers: dict[str, list[int]] = {}  # by request, as the next two
        self.endings: dict[str, str] = {}
        self.reasons: dict[str, Any] = {}  # stop reasons

    def add(self, images: Sequence[Image], text: int) -> str:
        """Add a request of some images and then some tokens of text, which wants three tokens; returns its name."""
        import torch
        from vllm.multimodal.inputs import (
            MultiModalFeatureSpec,
            MultiModalFieldElem,
            MultiModalKwargsItem,
            MultiModalSharedField,
            PlaceholderRange,
        )
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        tokens, features = [*_START], []
        for image in images:
            shared = MultiModalSharedField(batch_size=1)
            data = {"pixel_values": image.pixels, "image_grid_thw": torch.tensor(image.grid)}
            item = MultiModalKwargsItem({k: MultiModalFieldElem(data=v, field=shared) for k, v in data.items()})
            place = PlaceholderRange(offset=len(tokens), length=image.tokens)
            features.append(MultiModalFeatureSpec(item, "image", image.identifier, place, image.identifier))
            tokens += [_PLACE] * image.tokens
        tokens += [_TEXT] * text
        request = Request(
            request_id=f"request{next(_numbers)}",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=_ANSWER, ignore_eos=True),
            pooling_params=None,
            mm_features=features,
            block_hasher=get_request_block_hasher(_BLOCK, sha256),
        )
        self.answers[request.request_id] = []
        self.scheduler.add_request(request)
        return str(request.request_id)

    def abort(self, name: str) -> None:
        """End a request, as when its client goes away."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.endings.setdefault(name, "abort")

    def step(self) -> None:
        """Schedule and compute a step, if the queue has room, and take the oldest step's output, if it has none."""
        if len(self.queue) < self.depth and self.scheduler.has_requests():
            step = self.scheduler.schedule()
            self.queue.append((step, self.worker.run(self.scheduler, step)))
        if len(self.queue) == self.depth or (self.queue and not self.scheduler.has_unfinished_requests()):
            self._take()

    def _take(self) -> None:
        for client in self.scheduler.update_from_output(*self.queue.popleft()).values():
            for output in client.outputs:
                self.answers[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.endings.setdefault(output.request_id, str(output.finish_reason))
                    self.reasons[output.request_id] = output.stop_reason

    def busy(self) -> bool:
        """Whether a step is in flight or a request has not ended."""
        return bool(self.queue) or self.scheduler.has_unfinished_requests()


def make_scheduler(config: VllmConfig, kind: type[Scheduler], cached_tokens: int) -> Scheduler:
    """A scheduler with caches small enough to be evicted and preempted all the time.

    The encoder cache holds `cached_tokens`, and a step encodes that many at most.
    """
    import torch
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config.cache_config.num_gpu_blocks = _BLOCKS
    spec = FullAttentionSpec(block_size=_BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    made = kind(
        config,
        KVCacheConfig(num_blocks=_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(config),
        block_size=_BLOCK,
    )
    made.encoder_cache_manager = EncoderCacheManager(cache_size=cached_tokens)
    made.max_num_encoder_input_tokens = cached_tokens
    return made


def small_config(folder: str, *, asynchronous: bool, **arguments: Any) -> VllmConfig:
    """An engine configuration of a model's folder for such a scheduler."""
    from vllm.engine.arg_utils import EngineArgs

    config: VllmConfig = EngineArgs(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=160,
        max_num_seqs=5,
        max_num_batched_tokens=40,
        block_size=_BLOCK,
        enable_prefix_caching=True,
        **arguments,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    config.ec_transfer_config = None  # an active plug-in of this process may have set it
    return config
