"""An engine's configuration: what is served, and where the scheduler and the connector of this package come in."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from visionaccel.integrations.vllm.compat import logger
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES, replaced_architecture
from visionaccel.integrations.vllm.compat.contract import BY_OUR_SCHEDULER, FAILED_REQUESTS, Feature, missing, way_of
from visionaccel.integrations.vllm.compat.weight_files import load_config_of

if TYPE_CHECKING:
    import torch
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

CONNECTOR = "VisionAccelConnector"
_CONNECTOR_MODULE = "visionaccel.integrations.vllm.connector"
"""The EC connector of the pipelined mode and its module, as `--ec-transfer-config` names them."""

_SCHEDULERS = {
    False: "visionaccel.integrations.vllm.scheduler.ContainedScheduler",
    True: "visionaccel.integrations.vllm.scheduler.ContainedAsyncScheduler",
}
"""The scheduler in the place of vLLM's synchronous and of its asynchronous one."""

_MARK = "visionaccel"


def on_engine_config(prepare: Callable[[VllmConfig, bool], None]) -> None:
    """Call `prepare` with each configuration that `EngineArgs` builds in this process.

    It also gets whether the user lets clients send embeddings (`--enable-mm-embeds`). The module of `EngineArgs` may
    not be imported yet. It asks for the plug-ins whenever a configuration is made, so it is looked for then.
    """
    if _hook_engine_args(prepare):
        return
    import vllm.plugins as plugins

    load = plugins.load_general_plugins
    hooked = False

    @functools.wraps(load)
    def load_general_plugins() -> None:
        nonlocal hooked
        load()
        hooked = hooked or _hook_engine_args(prepare)

    plugins.load_general_plugins = load_general_plugins


def _hook_engine_args(prepare: Callable[[VllmConfig, bool], None]) -> bool:
    """Wrap `EngineArgs.create_engine_config`, if its module is imported; whether it is."""
    arguments: Any = sys.modules.get("vllm.engine.arg_utils")
    if not hasattr(arguments, "EngineArgs"):
        return False
    build = arguments.EngineArgs.create_engine_config

    @functools.wraps(build)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        config: VllmConfig = build(self, *args, **kwargs)
        model = config.model_config
        if getattr(self, "mm_device_do_normalize", None) is False and model.is_multimodal_model:
            # vLLM sets False for each model of this package. None means the same to vLLM; here, that the user set it.
            model.get_multimodal_config().mm_device_do_normalize = None
        prepare(config, bool(getattr(self, "enable_mm_embeds", False)))
        return config

    arguments.EngineArgs.create_engine_config = create_engine_config
    return True


def processor_options(model: ModelConfig) -> Mapping[str, Any]:
    """The image processor's options that are set for all requests (`--mm-processor-kwargs`)."""
    return model.get_multimodal_config().mm_processor_kwargs or {}


def mark_prepared(config: VllmConfig) -> None:
    """Note in a configuration, for the processes that receive it, that this package has seen it."""
    if isinstance(config.additional_config, dict):
        config.additional_config = {**config.additional_config, _MARK: "prepared"}


def is_prepared(config: VllmConfig) -> bool:
    """Whether a configuration was marked. One whose `additional_config` is not a dict cannot be."""
    given = config.additional_config
    return isinstance(given, dict) and _MARK in given


def without_python_processor() -> bool:
    """Whether vLLM's front end prepares images outside of Python, where this package has no part."""
    import vllm.envs as environment

    return bool(getattr(environment, "VLLM_USE_RUST_FRONTEND", False))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the adapter needs to know of the model that an engine serves."""

    source: str  # checkpoint folder or Hugging Face repository
    revision: str | None
    named: str  # its model classes, as the configuration names them
    replaces: str | None  # the architecture whose derived class vLLM makes the model from; None if from another class
    multimodal: bool  # it takes images or other media
    takes_media: bool  # at least one image or video a prompt is allowed
    own_implementation: bool  # vLLM's own model class serves it, not another library's
    dtype: torch.dtype  # of the language model
    device: str  # of the language model; where only the model's configuration is known, `cpu`
    vision: Mapping[str, Any] | None  # the tower's configuration after every override; None if it is not replaced
    epsilon: float | None = None  # what vLLM's tower adds to variances, if the configuration states it
    load: LoadConfig | None = None  # how vLLM loads the model, where that is known
    engine: str = ""  # the engine's identifier, which its workers share; empty as before
    adapts_tower: bool = False  # LoRA adapters are applied to the vision tower too (--enable-tower-connector-lora)
    pools: bool = False  # it answers with what a pooler makes of the hidden states, and not with text


def served_model(config: VllmConfig) -> ServedModel:
    """The model of an engine configuration."""
    served = served_by(config.model_config, str(config.device_config.device))
    adapts_tower = bool(getattr(config.lora_config, "enable_tower_connector_lora", False))
    return replace(served, load=config.load_config, engine=str(config.instance_id), adapts_tower=adapts_tower)


def served_by(model: ModelConfig, device: str = "cpu") -> ServedModel:
    """The model of a model configuration."""
    replaces = replaced_architecture(model)
    vision, epsilon = None, None
    if replaces is not None:
        row = ARCHITECTURES[replaces]
        vision = functools.reduce(lambda config, name: getattr(config, name, None), row.vision, model.hf_config)
        epsilon = getattr(model.hf_config, row.epsilon, None)
    limits = model.get_multimodal_config() if model.is_multimodal_model else None
    return ServedModel(
        source=model.model,
        revision=model.revision,
        named=", ".join(model.architectures),
        replaces=replaces,
        multimodal=bool(model.is_multimodal_model),
        takes_media=limits is not None and any(limits.get_limit_per_prompt(kind) for kind in ("image", "video")),
        own_implementation=str(getattr(model.model_impl, "value", model.model_impl)) in ("auto", "vllm"),
        pools=bool(model.runner_type == "pooling"),
        dtype=model.dtype,
        device=device,
        vision=None if vision is None else vision.to_dict(),
        epsilon=None if epsilon is None else float(epsilon),
        load=load_config_of(model),
    )


def is_one_of_several_api_servers(config: VllmConfig) -> bool:
    """Whether this process is an API server whose engines were started by another process, which has more like it."""
    parallel = config.parallel_config
    count, rank = getattr(parallel, "_api_process_count", 1), getattr(parallel, "_api_process_rank", 0)
    return bool(count > 1 and rank >= 0)


def can_contain(config: VllmConfig) -> bool:
    """Whether an engine can have the scheduler that ends the requests whose image could not be encoded.

    Not if vLLM lacks what that needs, if the user chose another scheduler, nor if keys leave this engine before the
    scheduler knows of a fault: then a fault of an in-line encode must end the engine, or others would compute with it.
    """
    return not (missing(Feature.CONTAINMENT) or _other_scheduler(config) or config.kv_transfer_config is not None)


def use_contained_scheduler(config: VllmConfig) -> None:
    """Choose the scheduler that ends the requests whose image could not be encoded, or warn that it cannot be had."""
    if can_contain(config):
        scheduling = config.scheduler_config
        scheduling.scheduler_cls = scheduling.scheduler_cls or _SCHEDULERS[bool(scheduling.async_scheduling)]
    elif not missing(Feature.CONTAINMENT) and config.scheduler_config.scheduler_cls not in _SCHEDULERS.values():
        reason = "kv_transfer_config"  # what else is missing is in the log
        if config.kv_transfer_config is None:
            reason = f"the custom scheduler {_other_scheduler(config)}"
        logger().warning("With %s, an image that cannot be encoded in the engine's step ends the engine.", reason)


def _other_scheduler(config: VllmConfig) -> Any:
    chosen = config.scheduler_config.scheduler_cls
    return None if chosen in _SCHEDULERS.values() else chosen


def _ec_connector(config: VllmConfig) -> str | None:
    return None if config.ec_transfer_config is None else config.ec_transfer_config.ec_connector


def is_pipelined(config: VllmConfig) -> bool:
    """Whether an engine gets its embeddings from this package's EC connector."""
    return _ec_connector(config) == CONNECTOR


def receives_embeddings(config: VllmConfig) -> bool:
    """Whether an engine gets its embeddings from some EC connector and encodes only what that does not have."""
    return _ec_connector(config) is not None and bool(config.ec_transfer_config.is_ec_consumer)


def use_connector(config: VllmConfig, client_embeds: bool) -> None:
    """Give an engine this package's EC connector.

    vLLM lets clients of a consumer send embeddings, because another engine may have computed them. Here none has, so
    that stays as the user set it (`client_embeds`).
    """
    from vllm.config import ECTransferConfig

    if config.ec_transfer_config is None:
        config.ec_transfer_config = ECTransferConfig(
            ec_connector=CONNECTOR, ec_role="ec_consumer", ec_connector_module_path=_CONNECTOR_MODULE
        )
    media = config.model_config.get_multimodal_config()
    media.enable_mm_embeds = client_embeds
    if hasattr(media, "allow_missing_mm_embeddings"):
        media.allow_missing_mm_embeddings = False


def obstacles_to_pipelining(config: VllmConfig) -> list[str]:
    """Why this package's EC connector cannot or should not be used; empty if it can be.

    A user who names it decides that it should: what the connector cannot see, it then leaves to the step.
    """
    found = []
    media = config.model_config.get_multimodal_config()
    if getattr(media, "video_pruning_rate", None):
        found.append("with --video-pruning-rate, vLLM prunes what its own encoder returns")
    if is_pipelined(config) and config.ec_transfer_config.ec_role != "ec_consumer":
        found.append(f"{CONNECTOR} gives embeddings to no other engine: its ec_role is ec_consumer")
    if not can_contain(config):
        ends = "request whose image failed can be ended by this package's scheduler only"
        if way_of(FAILED_REQUESTS) == BY_OUR_SCHEDULER:
            found.append(f"in this vLLM, a {ends}")
        elif served_model(config).pools:
            found.append(f"a pooling {ends}")
    if is_pipelined(config):
        return found
    other = _ec_connector(config)
    if other is not None:
        found.append(f"another EC connector is configured ({other})")
    if getattr(media, "mm_processor_cache_type", "lru") == "shm":
        found.append("with --mm-processor-cache-type shm, pixels do not pass the engine's scheduler")
    if config.parallel_config.distributed_executor_backend == "ray":
        found.append("it was not tried with Ray")
    return found
