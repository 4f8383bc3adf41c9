"""Registers the models, checks each engine's configuration or refuses to start, and chooses how to encode."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Literal, NamedTuple

from visionaccel.backends import check_names
from visionaccel.core.cores import Host, choose_cores
from visionaccel.errors import ConfigurationError
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import architectures, engine_config, serving, weight_files, worker
from visionaccel.integrations.vllm.compat.contract import WITHOUT, Feature, missing, why_off
from visionaccel.integrations.vllm.pipelined import self_test
from visionaccel.integrations.vllm.shared_memory import make_shared_memory
from visionaccel.settings import Settings, load_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_UNPREPARED = (
    "this engine's configuration was not made by vLLM's EngineArgs, or has an additional_config that is not a dict"
)

_HOW = {"pipelined": "while the language model decodes (pipelined)", "inline": "in the engine's step (in-line)"}


@cache
def activate() -> None:
    """Check what can be checked without a device, and register the model classes; once. Does not import torch."""
    compat.share_log_handlers()
    settings = load_settings()
    check_names(settings.backend, settings.fallback)
    choose_cores(settings.cpu_cores, Host(worker.started_cores(), frozenset(), ""))  # refused before models are loaded
    compat.warn_of_untried_release()
    architectures.register_models()
    if settings.metrics and not missing(Feature.METRICS):
        # Imported only in processes that serve `/metrics`.
        serving.on_metrics(
            lambda: import_module("visionaccel.integrations.vllm.published_metrics").PublishedCollector()
        )
    engine_config.on_engine_config(_prepare)  # last, because after an error all of this runs again


def _prepare(config: VllmConfig, client_embeds: bool) -> None:
    """Called with each engine configuration that vLLM builds: refuse what cannot work, and choose how to encode."""
    served = _served(config)
    if not served.multimodal:
        compat.logger().warning("VISIONACCEL_BACKEND has no effect: %s has no vision encoder.", served.named)
        return
    weight_files.remember_load_config(config)
    settings = load_settings()
    _check(config, served, settings)
    if served.takes_media:
        choice = choose_mode(config, settings)
        if engine_config.without_python_processor():
            compat.logger().warning(
                "visionaccel: with VLLM_USE_RUST_FRONTEND, requests do not pass through the Python front end. Options "
                "of requests (mm_processor_kwargs) and NaN in images are not checked there, image processing is not "
                "timed, and /metrics does not show the encoder's metrics.%s",
                "" if serving.takes_request_errors() else " The reason for a failed image is only in the log.",
            )
        compat.logger().info("visionaccel: images are encoded %s, because %s.", _HOW[choice.mode], choice.reason)
        if choice.mode == "pipelined":
            engine_config.use_connector(config, client_embeds)
    engine_config.use_contained_scheduler(config)
    make_shared_memory(inherit=engine_config.is_one_of_several_api_servers(config))
    if not missing(Feature.REASONS):
        serving.explain_errors()
    if served.pools:
        serving.explain_pooling_errors()
    engine_config.mark_prepared(config)


def _served(config: VllmConfig) -> engine_config.ServedModel:
    """Return the served model; log which features are off, and refuse to start if that could give wrong answers."""
    reason = why_off(Feature.INLINE)
    if reason is None:  # only then can the served model be known
        served = engine_config.served_model(config)
        reason = why_off(Feature.INLINE, served.replaces)
    if reason is not None:
        raise ConfigurationError(
            f"the vision encoder cannot be replaced: {reason}.",
            hint="Install a release of vLLM that docs/compatibility.md lists, or unset VISIONACCEL_BACKEND.",
        )
    reason = why_off(Feature.FITTING, served.replaces)
    if reason is not None and served.takes_media:
        _refuse_fitting(served, load_settings(), f"images cannot be fitted to them: {reason}")
    for feature in Feature:
        reason = why_off(feature, served.replaces)
        if reason is not None:
            compat.logger().warning("visionaccel: %s. Without it, %s.", reason, WITHOUT[feature])
    return served


def check_engine(config: VllmConfig) -> None:
    """Refuse what would give wrong answers; `_prepare` may not have seen the configuration."""
    served, settings = engine_config.served_model(config), load_settings()
    _check(config, served, settings)
    if not served.takes_media:
        return
    weight_files.require_default_loader(served.load)
    if not engine_config.is_prepared(config):
        _refuse_fitting(served, settings, f"{_UNPREPARED}, so images may not be fitted to them")
        compat.logger().warning(
            "visionaccel: %s. If it was not adjusted, images are encoded in the engine's step unless the configuration "
            "names %s, and an image that cannot be encoded stops the engine.",
            _UNPREPARED,
            engine_config.CONNECTOR,
        )


def _check(config: VllmConfig, served: engine_config.ServedModel, settings: Settings) -> None:
    """Refuse an engine that would run another vision encoder than the requested one."""
    if not served.own_implementation:
        raise ConfigurationError(
            "VISIONACCEL_BACKEND is set, but --model-impl selects another library's implementation of the model.",
            hint="Leave --model-impl at auto, or unset VISIONACCEL_BACKEND.",
        )
    if served.pools and (lacking := missing(Feature.POOLING)):
        raise ConfigurationError(
            f"pooling models cannot be served on vLLM {compat.release()}: {'; '.join(lacking)}.",
            hint="Unset VISIONACCEL_BACKEND to serve this model with vLLM's own encoder.",
        )
    if served.replaces is None:
        raise ConfigurationError(
            f"VISIONACCEL_BACKEND is set, but the vision encoder of {served.named} is not implemented.",
            hint="Unset it to serve this model with vLLM's own encoder. "
            f"Implemented: {', '.join(architectures.ARCHITECTURES)}.",
        )
    if not served.takes_media:
        return
    from visionaccel.integrations.vllm.encoder_source import served_spec  # not needed in every process
    from visionaccel.integrations.vllm.processing import changed_size

    spec, row = served_spec(served), architectures.ARCHITECTURES[served.replaces]
    if spec.rotary_base != row.rotary_base:
        raise ConfigurationError(
            f"the vision configuration sets rope_theta={spec.rotary_base:g}, but vLLM's vision encoder ignores that "
            f"and computes with {row.rotary_base:g}.",
            hint="Remove rope_theta from the vision configuration, or the override that sets it.",
        )
    if served.epsilon != spec.norm1.epsilon:
        path = ".".join(row.epsilon)
        raise ConfigurationError(
            f"vLLM's vision encoder has {path}={served.epsilon} with the served configuration, but only "
            f"{spec.norm1.epsilon} is implemented for this model.",
            hint="Drop an override of that value, or unset VISIONACCEL_BACKEND.",
        )
    changed = changed_size(engine_config.processor_options(config.model_config), spec)
    if changed is not None:
        raise ConfigurationError(
            f"--mm-processor-kwargs sets {changed}, which does not match the served model's vision encoder.",
            hint="Leave patch_size, temporal_patch_size and merge_size alone.",
        )
    if served.adapts_tower:
        raise ConfigurationError(
            "--enable-tower-connector-lora applies LoRA adapters to vLLM's own vision encoder, but "
            "VISIONACCEL_BACKEND replaces that encoder.",
            hint="Drop --enable-tower-connector-lora: adapters then apply to the language model alone. Or merge the "
            "adapter into the checkpoint, or unset VISIONACCEL_BACKEND.",
        )
    if engine_config.without_python_processor():
        _refuse_fitting(served, settings, "with VLLM_USE_RUST_FRONTEND, images are not fitted to them")
        if served.pools and not serving.takes_request_errors():
            raise ConfigurationError(
                "pooling models cannot be served with VLLM_USE_RUST_FRONTEND on vLLM "
                f"{compat.release()}: only its Python front end reports an image that failed as an error.",
                hint="Unset VLLM_USE_RUST_FRONTEND, or unset VISIONACCEL_BACKEND.",
            )


def _refuse_fitting(served: engine_config.ServedModel, settings: Settings, reason: str) -> None:
    """Refuse a bundle whose programs only take images that were fitted, because they would not be."""
    from visionaccel.integrations.vllm.encoder_source import grids_of  # imports much, and is rarely needed

    grids = grids_of(served, settings)
    if grids is not None and not (grids.rest and settings.fit == "none"):
        raise ConfigurationError(
            f"the programs of {settings.bundle} accept only {grids} (height x width in patches), but {reason}.",
            hint="Start a release of vLLM that docs/compatibility.md lists, by `vllm serve` or `LLM(...)` with its "
            "Python front end, use a bundle with a dynamic program, or set VISIONACCEL_FIT=none and "
            "VISIONACCEL_FALLBACK.",
        )


class ModeChoice(NamedTuple):
    """How an engine encodes, and why."""

    mode: Literal["pipelined", "inline"]
    reason: str


def choose_mode(config: VllmConfig, settings: Settings) -> ModeChoice:
    """Return the mode that the settings require, or the best one that is available.

    Raises:
        ConfigurationError: If the required mode is not available.
    """
    named = engine_config.is_pipelined(config)
    required = "VISIONACCEL_MODE=pipelined" if settings.mode == "pipelined" else None
    if named:
        required = f"--ec-transfer-config names {engine_config.CONNECTOR}"
    if settings.mode == "inline":
        if named:
            raise ConfigurationError(f"VISIONACCEL_MODE=inline, but {required}.", hint="Drop one of them.")
        return ModeChoice("inline", "VISIONACCEL_MODE=inline")
    obstacles = engine_config.obstacles_to_pipelining(config)
    kind = engine_config.served_model(config).device.partition(":")[0]
    shared = [device for device in settings.wanted_devices if device and device.partition(":")[0] == kind != "cpu"]
    if required is None and shared:
        obstacles.append(
            f"{shared[0]} belongs to the language model, whose memory vLLM plans without a second process there"
        )
    if not obstacles and (reason := why_off(Feature.PIPELINED)):
        obstacles.append(reason)
    if not obstacles:  # last, because it may take some seconds
        asynchronous = bool(config.scheduler_config.async_scheduling)
        problem = self_test.problem(contained=engine_config.can_contain(config), asynchronous=asynchronous)
        if problem is None:
            return ModeChoice("pipelined", required or "nothing prevents it")
        obstacles.append(f"its self-test on vLLM {compat.release()} failed: {problem}")
    if required is None:
        return ModeChoice("inline", "; ".join(obstacles))
    raise ConfigurationError(
        f"{required}, but pipelined mode is not available: {'; '.join(obstacles)}.",
        hint=f"Change that, or {'leave the choice to visionaccel' if named else 'set VISIONACCEL_MODE=auto'}.",
    )
