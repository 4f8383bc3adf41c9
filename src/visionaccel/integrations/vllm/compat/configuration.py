"""An engine's configuration: what is served, and where the scheduler and the connector of this package come in."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visionaccel.integrations.vllm.compat.checking import missing, way_of
from visionaccel.integrations.vllm.compat.contract import BY_OUR_SCHEDULER, FAILED_REQUESTS, Feature
from visionaccel.integrations.vllm.compat.releases import logger

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig

__all__ = [
    "can_contain", "CONNECTOR", "ec_connector", "impossible_with_connector", "is_one_of_several_api_servers",
    "is_pipelined", "is_replaced", "load_plugins", "obstacles_to_pipelining", "on_engine_config", "pools",
    "receives_embeddings", "register_model", "served_model", "ServedModel", "takes_media", "use_connector",
    "use_contained_scheduler", "use_ec_connector", "use_model_in_process",
]  # fmt: skip

CONNECTOR = "VisionAccelConnector"
CONNECTOR_MODULE = "visionaccel.integrations.vllm.connector"
"""The EC connector of the pipelined mode and its module, as `--ec-transfer-config` names them."""

SCHEDULERS = {
    False: "visionaccel.integrations.vllm.scheduler.ContainedScheduler",
    True: "visionaccel.integrations.vllm.scheduler.ContainedAsyncScheduler",
}
"""The scheduler in the place of vLLM's synchronous and of its asynchronous one."""


def load_plugins() -> None:
    """Load vLLM's general plug-ins, as its processes do when they start.

    Raises:
        Exception: What a plug-in raises that vLLM does not catch.
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def register_model(architecture: str, model: str) -> None:
    """Register a model class, as `module:Class`, in the place of vLLM's own."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(architecture, model)


def use_model_in_process(architecture: str) -> None:
    """Let vLLM look at one of its model classes in this process, instead of in a child that imports it."""
    from vllm import ModelRegistry

    found = ModelRegistry.models.get(architecture)
    if found is not None:
        ModelRegistry.register_model(architecture, found.load_model_cls())


def is_replaced(architecture: str) -> bool:
    """Whether vLLM will make a model of that architecture from a class of this package."""
    from vllm import ModelRegistry

    return str(getattr(ModelRegistry.models.get(architecture), "module_name", "")).startswith("visionaccel.")


def on_engine_config(prepare: Callable[[VllmConfig, bool], None]) -> None:
    """Call `prepare` with each configuration that `EngineArgs` builds in this process.

    Args:
        prepare: Gets the configuration, and whether the user lets clients send embeddings (`--enable-mm-embeds`).
    """
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is None:  # A process that is handed its configuration: engine core, worker, registry inspection.
        return
    build = arguments.EngineArgs.create_engine_config

    @functools.wraps(build)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        config: VllmConfig = build(self, *args, **kwargs)
        prepare(config, bool(getattr(self, "enable_mm_embeds", False)))
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


def pools(config: VllmConfig) -> bool:
    """Whether an engine answers with what a pooler makes of the hidden states, and not with text."""
    return bool(config.model_config.runner_type == "pooling")


def takes_media(model: ModelConfig) -> bool:
    """Whether prompts may hold an image or a video."""
    limits = model.get_multimodal_config() if model.is_multimodal_model else None
    return limits is not None and any(limits.get_limit_per_prompt(kind) for kind in ("image", "video"))


def use_contained_scheduler(config: VllmConfig) -> bool:
    """Choose the scheduler that ends the requests whose image could not be encoded, where that can be done.

    Returns:
        Whether it was chosen. Not if vLLM lacks what that needs, if the user chose another, nor if keys leave this
        engine before the scheduler hears of a fault: then a fault of an in-line encode must end the engine, or others
        would compute with it.
    """
    if missing(Feature.CONTAINMENT):  # the log has what is missing
        return False
    chosen = config.scheduler_config.scheduler_cls
    connected = getattr(config, "kv_transfer_config", None) is not None
    if chosen is None and not connected:
        config.scheduler_config.scheduler_cls = SCHEDULERS[bool(config.scheduler_config.async_scheduling)]
        return True
    if chosen in SCHEDULERS.values():
        return True
    reason = "With kv_transfer_config," if connected else f"With the custom scheduler {chosen},"
    logger().warning("%s an image that cannot be encoded in the engine's step ends the engine.", reason)
    return False


def is_one_of_several_api_servers(config: VllmConfig) -> bool:
    """Whether this process is an API server whose engines were started by another process, which has more like it."""
    parallel = config.parallel_config
    count, rank = getattr(parallel, "_api_process_count", 1), getattr(parallel, "_api_process_rank", 0)
    return bool(count > 1 and rank >= 0)


def ec_connector(config: VllmConfig) -> str | None:
    """Name of the EC connector that an engine is configured with."""
    transfer = getattr(config, "ec_transfer_config", None)
    return None if transfer is None else transfer.ec_connector


def is_pipelined(config: VllmConfig) -> bool:
    """Whether an engine gets its embeddings from this package's EC connector."""
    return ec_connector(config) == CONNECTOR


def receives_embeddings(config: VllmConfig) -> bool:
    """Whether an engine gets its embeddings from some EC connector and encodes only what that does not have."""
    return ec_connector(config) is not None and bool(config.ec_transfer_config.is_ec_consumer)


def use_ec_connector(config: VllmConfig, name: str, module: str) -> None:
    """Have an engine get its embeddings from an EC connector of that name in that module."""
    from vllm.config import ECTransferConfig

    config.ec_transfer_config = ECTransferConfig(
        ec_connector=name, ec_role="ec_consumer", ec_connector_module_path=module
    )


def use_connector(config: VllmConfig, client_embeds: bool) -> None:
    """Give an engine this package's EC connector.

    vLLM lets clients of a consumer send embeddings, because another engine may have computed them. Here none has, so
    that stays as the user set it.

    Args:
        config: The engine's configuration.
        client_embeds: The user lets clients send embeddings.
    """
    if config.ec_transfer_config is None:
        use_ec_connector(config, CONNECTOR, CONNECTOR_MODULE)
    media = config.model_config.get_multimodal_config()
    media.enable_mm_embeds = client_embeds
    if hasattr(media, "allow_missing_mm_embeddings"):
        media.allow_missing_mm_embeddings = False


def can_contain(config: VllmConfig) -> bool:
    """Whether an engine can have the scheduler that ends the requests whose image could not be encoded."""
    custom = config.scheduler_config.scheduler_cls not in (None, *SCHEDULERS.values())
    return not (custom or missing(Feature.CONTAINMENT) or getattr(config, "kv_transfer_config", None) is not None)


def impossible_with_connector(config: VllmConfig) -> list[str]:
    """Why an engine would answer wrongly, or not at all, with this package's EC connector; empty if it would not."""
    found = []
    media = config.model_config.get_multimodal_config()
    if getattr(media, "video_pruning_rate", None):
        found.append("with --video-pruning-rate, vLLM prunes what its own encoder returns")
    if is_pipelined(config) and (config.ec_transfer_config.ec_role != "ec_consumer"):
        found.append(f"{CONNECTOR} gives embeddings to no other engine: its ec_role is ec_consumer")
    if not can_contain(config):
        ends = "request whose image failed can be ended by this package's scheduler only"
        if way_of(FAILED_REQUESTS) == BY_OUR_SCHEDULER:
            found.append(f"in this vLLM, a {ends}")
        elif pools(config):
            found.append(f"a pooling {ends}")
    return found


def obstacles_to_pipelining(config: VllmConfig) -> list[str]:
    """Why this package's EC connector should not be taken unless the user names it; empty if it can be."""
    found = []
    other = ec_connector(config)
    if other not in (None, CONNECTOR):
        found.append(f"another EC connector is configured ({other})")
    if getattr(config.model_config.get_multimodal_config(), "mm_processor_cache_type", "lru") == "shm":
        found.append("with --mm-processor-cache-type shm, pixels do not pass the engine's scheduler")
    if config.parallel_config.distributed_executor_backend == "ray":
        found.append("it was not tried with Ray")
    return found
