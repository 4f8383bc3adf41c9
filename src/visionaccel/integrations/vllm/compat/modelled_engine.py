"""vLLM's real scheduler with a modelled worker, without a model or a device, for the self-test and the tests."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import ModelRegistry
from vllm.config import ECTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import inputs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from visionaccel.core.grid import Grid

GRID, IMAGE_TOKENS = Grid(1, 6, 6), 9
"""The grid of each image, and the tokens that it takes in a prompt."""

BLOCK, _BLOCKS = 8, 24
"""Tokens in a block of the KV cache, and blocks, few enough that requests preempt one another."""

_CACHED_IMAGES = 3
"""Images in the encoder cache, few enough that they evict one another; also the most that one step encodes."""

ANSWER = 3
"""Tokens that a request generates."""

_START, _PLACE, _TEXT = [1, 2], 12, 30
_LANGUAGE_MODEL = "Qwen2ForCausalLM"
_numbers = itertools.count()


def images_read(request: Any, start: int, end: int) -> list[str]:
    """Return the identifiers of the images that a request's tokens from `start` to `end` stand for."""
    return [
        feature.identifier
        for feature in request.mm_features
        if feature.mm_position.offset < end and start < feature.mm_position.offset + feature.mm_position.length
    ]


class ModelledEngine:
    """A scheduler, and a subclass's model of a worker, with as many steps in flight as vLLM has with that scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._depth = 2 if any("Async" in base.__name__ for base in type(scheduler).__mro__) else 1
        self._queue: deque[tuple[SchedulerOutput, Any]] = deque()
        # By request:
        self.answers: dict[str, list[int]] = {}
        self.endings: dict[str, str] = {}
        self.reasons: dict[str, Any] = {}  # stop reasons

    def pixels(self, image: int) -> torch.Tensor:  # noqa: ARG002
        """[P, patch_width] of an image, by its number."""
        return torch.zeros(GRID.patches, 1)

    def compute(self, step: SchedulerOutput) -> Mapping[str, int]:
        """Compute a step as a worker would, and return each request's next token."""
        raise NotImplementedError

    def add(self, images: Sequence[int], text: int) -> str:
        """Add a request of some images and then some tokens of text; return its name."""
        init_none_hash(sha256)
        tokens, features = [*_START], []
        for image in images:
            name, field = f"image{image}", inputs.MultiModalSharedField(batch_size=1)
            data = {"pixel_values": self.pixels(image), "image_grid_thw": torch.tensor([GRID.t, GRID.h, GRID.w])}
            elements = {key: inputs.MultiModalFieldElem(data=value, field=field) for key, value in data.items()}
            item = inputs.MultiModalKwargsItem(elements)
            place = inputs.PlaceholderRange(offset=len(tokens), length=IMAGE_TOKENS)
            features.append(inputs.MultiModalFeatureSpec(item, "image", name, place, name))
            tokens += [_PLACE] * IMAGE_TOKENS
        tokens += [_TEXT] * text
        request = Request(
            request_id=f"request{next(_numbers)}",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=ANSWER, ignore_eos=True),
            pooling_params=None,
            mm_features=features,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.answers[request.request_id] = []
        self.scheduler.add_request(request)
        return str(request.request_id)

    def abort(self, name: str) -> None:
        """End a request, as when its client disconnects."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.endings.setdefault(name, "abort")

    def step(self) -> None:
        """Schedule and compute a step if not enough are in flight; otherwise return the oldest one's output first."""
        if len(self._queue) < self._depth and self.scheduler.has_requests():
            step = self.scheduler.schedule()
            self._queue.append((step, self._output(step)))
        if len(self._queue) < self._depth and (not self._queue or self.scheduler.has_unfinished_requests()):
            return
        for client in self.scheduler.update_from_output(*self._queue.popleft()).values():
            for output in client.outputs:
                self.answers[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    self.endings.setdefault(output.request_id, str(output.finish_reason))
                    self.reasons[output.request_id] = output.stop_reason

    def _output(self, step: SchedulerOutput) -> Any:
        tokens, names = self.compute(step), list(step.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        sampled = [
            [tokens[request.request_id]] if request.num_computed_tokens >= request.num_prompt_tokens else []
            for request in requests
        ]
        places = {name: place for place, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=sampled)

    def busy(self) -> bool:
        """Return whether a step is in flight or a request has not ended."""
        return bool(self._queue) or self.scheduler.has_unfinished_requests()


def make_scheduler(config: VllmConfig) -> Scheduler:
    """Return the scheduler of a configuration, with caches small enough that it often evicts and preempts."""
    config.cache_config.num_gpu_blocks = _BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    made: Scheduler = config.scheduler_config.get_scheduler_cls()(
        config,
        KVCacheConfig(num_blocks=_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(config),
        block_size=BLOCK,
    )
    made.max_num_encoder_input_tokens = _CACHED_IMAGES * IMAGE_TOKENS
    made.encoder_cache_manager = EncoderCacheManager(cache_size=made.max_num_encoder_input_tokens)
    return made


def small_config(folder: str, *, asynchronous: bool, **arguments: Any) -> VllmConfig:
    """Return an engine configuration for such a scheduler, of the model in a folder."""
    config: VllmConfig = EngineArgs(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=160,
        max_num_seqs=5,
        max_num_batched_tokens=40,
        block_size=BLOCK,
        enable_prefix_caching=True,
        **arguments,
    ).create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    config.scheduler_config.scheduler_cls = None  # a plug-in that is active here may have set this, and the next one
    config.ec_transfer_config = None
    return config


def config_without_model(folder: Path, connector: type, *, asynchronous: bool) -> VllmConfig:
    """Return a `small_config` with an EC connector and no weights; write its model's configuration to a folder.

    The model is a language model, because the scheduler only looks at the images of requests.
    """
    # Registered as a class, so that vLLM inspects it in this process and not in a child that imports it.
    ModelRegistry.register_model(_LANGUAGE_MODEL, ModelRegistry.models[_LANGUAGE_MODEL].load_model_cls())
    model = {"architectures": [_LANGUAGE_MODEL], "model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    config = small_config(str(folder), asynchronous=asynchronous, skip_tokenizer_init=True)
    config.ec_transfer_config = ECTransferConfig(
        ec_connector=connector.__name__, ec_role="ec_consumer", ec_connector_module_path=connector.__module__
    )
    return config
