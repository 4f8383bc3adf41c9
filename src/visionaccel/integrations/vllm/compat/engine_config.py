"""An engine's configuration: what is served, and how this package's scheduler and connector are configured."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from visionaccel.families import family_for
from visionaccel.integrations.vllm.compat import logger
from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES, replaced_architecture
from visionaccel.integrations.vllm.compat.contract import BY_OUR_SCHEDULER, FAILED_REQUESTS, Feature, missing, way_of
from visionaccel.integrations.vllm.compat.weight_files import load_config_of

if TYPE_CHECKING:
    import torch
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

CONNECTOR = "VisionAccelConnector"
_CONNECTOR_MODULE = "visionaccel.integrations.vllm.connector"
"""The EC connector of the pipelined mode and its module, as in `--ec-transfer-config`."""

_SCHEDULERS = {
    False: "visionaccel.integrations.vllm.scheduler.ContainedScheduler",
    True: "visionaccel.integrations.vllm.scheduler.ContainedAsyncScheduler",
}
"""This package's schedulers by whether they are asynchronous."""

_MARK = "visionaccel"


def on_engine_config(prepare: Callable[[VllmConfig, bool], None]) -> None:
    """Call `prepare` with each configuration that `EngineArgs` builds, and whether clients may send embeddings.

    `EngineArgs` may not be imported yet. It loads the plug-ins for each configuration, so it can be wrapped then.
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
    """Wrap `EngineArgs.create_engine_config` if its module is imported, and return whether it is."""
    arguments: Any = sys.modules.get("vllm.engine.arg_utils")
    if not hasattr(arguments, "EngineArgs"):
        return False
    build = arguments.EngineArgs.create_engine_config

    @functools.wraps(build)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        config: VllmConfig = build(self, *args, **kwargs)
        model = config.model_config
        if getattr(self, "mm_device_do_normalize", None) is False and model.is_multimodal_model:
            # vLLM sets False for this package's models too. None has the same effect, and marks that the user set it.
            model.get_multimodal_config().mm_device_do_normalize = None
        prepare(config, bool(getattr(self, "enable_mm_embeds", False)))
        return config

    arguments.EngineArgs.create_engine_config = create_engine_config
    return True


def processor_options(model: ModelConfig) -> Mapping[str, Any]:
    """Return the image processor's options for all requests (`--mm-processor-kwargs`)."""
    return model.get_multimodal_config().mm_processor_kwargs or {}


def mark_prepared(config: VllmConfig) -> None:
    """Mark a configuration as seen by this package, for the processes that receive it."""
    if isinstance(config.additional_config, dict):
        config.additional_config = {**config.additional_config, _MARK: "prepared"}


def is_prepared(config: VllmConfig) -> bool:
    """Return whether a configuration was marked; one whose `additional_config` is not a dict cannot be."""
    return isinstance(config.additional_config, dict) and _MARK in config.additional_config


def without_python_processor() -> bool:
    """Return whether vLLM's front end prepares images outside of Python, and so without this package."""
    from vllm import envs

    return bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What this package needs to know of the model that an engine serves."""

    source: str  # checkpoint folder or Hugging Face repository
    revision: str | None
    named: str  # its model classes, as in the configuration
    replaces: str | None  # the architecture whose derived class vLLM uses; None if it uses another class
    multimodal: bool  # whether it takes images or other media
    takes_media: bool  # whether prompts may contain an image or video
    own_implementation: bool  # whether vLLM's own model class is used, and not another library's
    dtype: torch.dtype  # of the language model
    device: str  # of the language model; `cpu` if only the model's configuration is known
    vision: Mapping[str, Any] | None  # the tower's configuration after every override; None if it is not replaced
    epsilon: float | None = None  # what vLLM's tower adds to variances; None if it is not replaced
    load: LoadConfig | None = None  # how vLLM loads the model, if known
    engine: str = ""  # the engine's identifier, which its workers share; empty if unknown
    adapts_tower: bool = False  # whether LoRA adapters apply to the tower too (--enable-tower-connector-lora)
    pools: bool = False  # whether it returns what a pooler makes of the hidden states, and not text


def served_model(config: VllmConfig) -> ServedModel:
    """Return the model of an engine configuration."""
    served = served_by(config.model_config, str(config.device_config.device))
    adapts_tower = bool(getattr(config.lora_config, "enable_tower_connector_lora", False))
    return replace(served, load=config.load_config, engine=str(config.instance_id), adapts_tower=adapts_tower)


def served_by(model: ModelConfig, device: str = "cpu") -> ServedModel:
    """Return the model of a model configuration."""
    replaces = replaced_architecture(model)
    vision, epsilon = None, None
    if replaces is not None:
        row = ARCHITECTURES[replaces]
        vision = _at(model.hf_config, family_for(replaces).config)
        epsilon = _at(model.hf_config, row.epsilon)
        epsilon = row.usual_epsilon if epsilon is None else float(epsilon)
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
        epsilon=epsilon,
        load=load_config_of(model),
    )


def _at(config: Any, path: Iterable[str]) -> Any:
    """Return what a path of attributes leads to; None if one is missing."""
    return functools.reduce(lambda found, name: getattr(found, name, None), path, config)


def is_one_of_several_api_servers(config: VllmConfig) -> bool:
    """Return whether this process is one of several API servers, whose engines their common parent has started."""
    parallel = config.parallel_config
    return bool(getattr(parallel, "_api_process_count", 1) > 1 and getattr(parallel, "_api_process_rank", 0) >= 0)


def can_contain(config: VllmConfig) -> bool:
    """Return whether an engine can have this package's scheduler, which ends the requests whose image failed.

    It cannot if vLLM lacks what that needs, or the user chose another scheduler. It must not if the KV cache is sent to
    other engines before the scheduler knows of a fault: a fault of an in-line encode then has to end the engine.
    """
    return not (missing(Feature.CONTAINMENT) or _other_scheduler(config) or config.kv_transfer_config is not None)


def use_contained_scheduler(config: VllmConfig) -> None:
    """Configure this package's scheduler, or log a warning that it cannot be used."""
    if can_contain(config):
        scheduling = config.scheduler_config
        scheduling.scheduler_cls = scheduling.scheduler_cls or _SCHEDULERS[bool(scheduling.async_scheduling)]
    elif not missing(Feature.CONTAINMENT) and config.scheduler_config.scheduler_cls not in _SCHEDULERS.values():
        custom = _other_scheduler(config)  # if a name is missing, the log says so already
        reason = "kv_transfer_config" if config.kv_transfer_config is not None else f"the custom scheduler {custom}"
        logger().warning("With %s, an image that cannot be encoded in the engine's step stops the engine.", reason)


def _other_scheduler(config: VllmConfig) -> Any:
    chosen = config.scheduler_config.scheduler_cls
    return None if chosen in _SCHEDULERS.values() else chosen


def _ec_connector(config: VllmConfig) -> str | None:
    return None if config.ec_transfer_config is None else config.ec_transfer_config.ec_connector


def is_pipelined(config: VllmConfig) -> bool:
    """Return whether this package's EC connector is configured."""
    return _ec_connector(config) == CONNECTOR


def receives_embeddings(config: VllmConfig) -> bool:
    """Return whether an engine gets embeddings from some EC connector, and only encodes what that lacks."""
    return _ec_connector(config) is not None and bool(config.ec_transfer_config.is_ec_consumer)


def use_connector(config: VllmConfig, client_embeds: bool) -> None:
    """Configure this package's EC connector.

    vLLM then lets clients send embeddings, because another engine may have computed them. No other engine does so here,
    so the user's own setting is restored (`client_embeds`).
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
    """Return why this package's EC connector cannot or should not be used; empty if it can be.

    If the user configured it, only what makes it impossible counts: images that it cannot see are encoded in the step.
    """
    found = []
    media = config.model_config.get_multimodal_config()
    if getattr(media, "video_pruning_rate", None):
        found.append("with --video-pruning-rate, vLLM prunes what its own encoder returns")
    if is_pipelined(config) and config.ec_transfer_config.ec_role != "ec_consumer":
        found.append(f"{CONNECTOR} sends embeddings to no other engine: its ec_role is ec_consumer")
    if not can_contain(config):
        ends = "request whose image failed can only be ended by this package's scheduler"
        if way_of(FAILED_REQUESTS) == BY_OUR_SCHEDULER:
            found.append(f"in this vLLM, a {ends}")
        elif served_model(config).pools:
            found.append(f"a pooling {ends}")
    if is_pipelined(config):
        return found
    other = _ec_connector(config)
    if other is not None:
        found.append(f"a different EC connector is configured ({other})")
    if getattr(media, "mm_processor_cache_type", "lru") == "shm":
        found.append("with --mm-processor-cache-type shm, pixels do not pass the engine's scheduler")
    if config.parallel_config.distributed_executor_backend == "ray":
        found.append("it has not been tested with Ray")
    return found
