"""vLLM's real scheduler, driving a worker that is modelled by what depends on what."""

import itertools
from collections import deque
from dataclasses import dataclass, field

import torch

from visionaccel.grid import Grid
from visionaccel.integrations.vllm.faults import Fault, report_fault
from visionaccel.runtime.keys import item_key

GOOD, TAINTED = 7, 13
BLOCK, BLOCKS = 8, 24
IMAGE_TOKENS = 9
IMAGES = 4
PATCH_WIDTH = 3 * 2 * 14 * 14
_numbers = itertools.count()


def pixels(image):
    return torch.full((IMAGE_TOKENS * 4, PATCH_WIDTH), image / 8)


GRID = Grid(1, 6, 6)


@dataclass
class Worker:
    """What a worker computes from what. Like vLLM's newer runner, it does not encode again what it still holds."""

    broken: set = field(default_factory=set)
    lying: set = field(default_factory=set)  # encoded wrongly, and nobody is told
    outputs: dict = field(default_factory=dict)  # identifier -> whether its encode went well
    tainted: set = field(default_factory=set)  # (block, slot)

    def run(self, scheduler, step):
        from vllm.v1.outputs import ModelRunnerOutput

        for identifier in step.free_encoder_mm_hashes:
            self.outputs.pop(identifier, None)
        for name, indices in step.scheduled_encoder_inputs.items():
            for index in indices:
                self.encode(scheduler.requests[name].mm_features[index].identifier)
        names = list(step.num_scheduled_tokens)
        sampled = [self.compute(scheduler, name, step.num_scheduled_tokens[name]) for name in names]
        places = {name: i for i, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=sampled)

    def encode(self, identifier):
        if identifier not in self.outputs:
            image = int(identifier.removeprefix("image"))
            self.outputs[identifier] = image not in self.broken | self.lying
            if image in self.broken:
                assert report_fault(Fault(item_key(pixels(image), GRID), f"image {image} is broken"))

    def compute(self, scheduler, name, count):
        request = scheduler.requests[name]
        table = scheduler.kv_cache_manager.get_block_ids(name)[0]
        start = request.num_computed_tokens - count
        slots = [(table[p // BLOCK], p % BLOCK) for p in range(start + count)]
        tainted = any(slot in self.tainted for slot in slots[:start])
        for position, slot in enumerate(slots[start:], start):
            for feature in request.mm_features:
                place = feature.mm_position
                if place.offset <= position < place.offset + place.length:
                    tainted |= not self.outputs[feature.identifier]
            (self.tainted.add if tainted else self.tainted.discard)(slot)
        finished_prompt = start + count >= request.num_prompt_tokens
        return [TAINTED if tainted else GOOD] if finished_prompt else []


class Engine:
    """A scheduler and a worker, with up to `depth` steps in flight."""

    def __init__(self, scheduler, depth):
        self.scheduler, self.depth = scheduler, depth
        self.worker = Worker()
        self.queue = deque()
        self.answers = {}
        self.endings = {}
        self.reasons = {}

    def add(self, images, text):
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
        tokens, features = [1, 2], []
        for image in images:
            shared = MultiModalSharedField(batch_size=1)
            grid = torch.tensor([GRID.t, GRID.h, GRID.w])
            data = {"pixel_values": pixels(image), "image_grid_thw": grid}
            item = MultiModalKwargsItem({k: MultiModalFieldElem(data=v, field=shared) for k, v in data.items()})
            place = PlaceholderRange(offset=len(tokens), length=IMAGE_TOKENS)
            features.append(MultiModalFeatureSpec(item, "image", f"image{image}", place, f"image{image}"))
            tokens += [12] * IMAGE_TOKENS
        tokens += [30] * text
        request = Request(
            request_id=f"request{next(_numbers)}",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=3, ignore_eos=True),
            pooling_params=None,
            mm_features=features,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.answers[request.request_id] = []
        self.scheduler.add_request(request)
        return request.request_id

    def abort(self, name):
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.endings.setdefault(name, "abort")

    def step(self):
        if len(self.queue) < self.depth and self.scheduler.has_requests():
            step = self.scheduler.schedule()
            self.queue.append((step, self.worker.run(self.scheduler, step)))
        if len(self.queue) == self.depth or (self.queue and not self.scheduler.has_unfinished_requests()):
            self.take()

    def take(self):
        for client in self.scheduler.update_from_output(*self.queue.popleft()).values():
            for output in client.outputs:
                self.answers[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.endings.setdefault(output.request_id, str(output.finish_reason))
                    self.reasons[output.request_id] = output.stop_reason

    def drain(self):
        for _ in range(400):
            if not self.queue and not self.scheduler.has_unfinished_requests():
                return
            self.step()
        raise AssertionError("the engine does not come to an end")


def make_scheduler(checkpoint, kind, *, pipelined):
    """A contained scheduler of vLLM's, with caches small enough to be evicted and preempted all the time."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from visionaccel.integrations.vllm import compat
    from visionaccel.integrations.vllm.scheduler import ContainedAsyncScheduler, ContainedScheduler

    config = EngineArgs(
        model=str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        max_model_len=160,
        max_num_seqs=5,
        max_num_batched_tokens=40,
        block_size=BLOCK,
        enable_prefix_caching=True,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = kind == "async"
    config.cache_config.num_gpu_blocks = BLOCKS
    config.ec_transfer_config = None  # whatever an active plug-in of this process has made of it
    if pipelined:
        compat.use_connector(config, client_embeds=False)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    made = (ContainedAsyncScheduler if kind == "async" else ContainedScheduler)(
        config,
        KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(config),
        block_size=BLOCK,
    )
    made.encoder_cache_manager = EncoderCacheManager(cache_size=3 * IMAGE_TOKENS)
    made.max_num_encoder_input_tokens = 3 * IMAGE_TOKENS
    return made


def depth(scheduler):
    """Steps that vLLM keeps in flight with a scheduler."""
    return 2 if "Async" in type(scheduler).__name__ else 1


def forget(scheduler):
    """Empty the scheduler's caches, as a fresh worker's are."""
    scheduler.encoder_cache_manager.reset()
    assert scheduler.reset_prefix_cache()
    scheduler._forgotten.clear()
