"""Registers the models, and checks each engine's configuration: it is prepared, or vLLM refuses to start."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from visionaccel.backends import AUTO, default_registry
from visionaccel.core.cores import Host, choose_cores
from visionaccel.errors import ConfigurationError, SettingsError
from visionaccel.integrations.vllm import compat
from visionaccel.integrations.vllm.compat import (
    architectures,
    engine_config,
    releases,
    serving,
    weight_files,
    worker,
)
from visionaccel.integrations.vllm.compat.contract import WITHOUT, Feature, missing, why_off
from visionaccel.integrations.vllm.mode import choose_mode
from visionaccel.integrations.vllm.shared_memory import make_shared_memory
from visionaccel.settings import Settings, load_settings

if TYPE_CHECKING:
    from prometheus_client.registry import Collector
    from vllm.config import VllmConfig

_UNPREPARED = (
    "this engine's configuration was not made by vLLM's EngineArgs, or has an additional_config that is not a dict"
)

_HOW = {"pipelined": "while the language model decodes (pipelined)", "inline": "in the engine's step (in-line)"}


@cache
def activate() -> None:
    """Check what can be checked without a device and register the model classes. Imports no torch; runs once.

    Raises:
        ConfigurationError: If a setting is invalid or a named backend is not installed.
    """
    compat.share_log_handlers()
    settings = load_settings()
    if AUTO in settings.fallback:
        raise SettingsError(
            "VISIONACCEL_FALLBACK='auto': a fallback must be named.", hint="Name a backend, such as torch_ref."
        )
    for name in (settings.backend, *settings.fallback):
        if name not in (None, AUTO):
            default_registry().entry(name)
    choose_cores(settings.cpu_cores, Host(worker.started_cores(), frozenset(), ""))  # refused before models are loaded
    releases.warn_of_untried_release()
    architectures.register_models()
    if settings.metrics and not missing(Feature.METRICS):
        serving.on_metrics(_collector)
    engine_config.on_engine_config(_prepare)  # last: after an error, all of this runs again


def _collector() -> Collector:
    from visionaccel.integrations.vllm.published_metrics import PublishedCollector  # only where `/metrics` is answered

    return PublishedCollector()


def _prepare(config: VllmConfig, client_embeds: bool) -> None:
    """Called with each engine configuration that vLLM builds: refuse what cannot work, and choose how to encode.

    Raises:
        ConfigurationError: If vLLM would run a vision encoder of its own, or cannot encode in the mode that is set.
    """
    served = _served(config)
    named = ", ".join(served.architectures)
    if not served.multimodal:
        compat.logger().warning("VISIONACCEL_BACKEND has no effect: %s has no vision encoder.", named)
        return
    weight_files.remember_load_config(config)
    settings = load_settings()
    _check(config, served, settings)
    if served.takes_media:
        choice = choose_mode(config, settings)
        _warn_of_rust()
        compat.logger().info("visionaccel: images are encoded %s, because %s.", _HOW[choice.mode], choice.reason)
        if choice.mode == "pipelined":
            engine_config.use_connector(config, client_embeds)
    engine_config.use_contained_scheduler(config)
    make_shared_memory(inherit=engine_config.is_one_of_several_api_servers(config))
    if not missing(Feature.REASONS):
        serving.explain_errors()
    if engine_config.pools(config):
        serving.explain_pooling_errors()
    engine_config.mark_prepared(config)


def _served(config: VllmConfig) -> engine_config.ServedModel:
    """The served model; logs which features are off, and refuses to start where an answer could then be wrong.

    Raises:
        ConfigurationError: If the contract of the in-line mode does not hold, on which all else stands; or if that of
            fitting does not, and it is needed.
    """
    without = "Install a release of vLLM that docs/compatibility.md names, or unset VISIONACCEL_BACKEND."
    reason = why_off(Feature.INLINE)
    if reason is None:  # only then can it be known what is served
        served = engine_config.served_model(config)
        reason = why_off(Feature.INLINE, served.replaces)
    if reason is not None:
        raise ConfigurationError(f"the vision encoder cannot be replaced: {reason}.", hint=without)
    reason = why_off(Feature.FITTING, served.replaces)
    if reason is not None and _limits_grids(served):
        raise ConfigurationError(
            f"the encoder's programs take some image sizes only, and images cannot be fitted to them: {reason}.",
            hint=f"Use a bundle with a dynamic program. {without}",
        )
    for feature in Feature:
        reason = why_off(feature, served.replaces)
        if reason is not None:
            compat.logger().warning("visionaccel: %s. Without it, %s.", reason, WITHOUT[feature])
    return served


def _limits_grids(served: engine_config.ServedModel) -> bool:
    """Whether the encoder takes some grids only, so that images are fitted to them."""
    from visionaccel.integrations.vllm.encoder_source import grids_of  # only where fitting is off

    return served.takes_media and grids_of(served, load_settings()) is not None


def check_engine(config: VllmConfig) -> None:
    """Called where a model of this package is made: check a configuration that `_prepare` may never have seen.

    `EngineArgs` is not the only way to a configuration, and in a process that has made its own before this package was
    loaded, it passes this package by.

    Raises:
        ConfigurationError: If this engine would give wrong answers.
    """
    served, settings = engine_config.served_model(config), load_settings()
    _check(config, served, settings)
    if served.takes_media:
        weight_files.require_default_loader(served.load)
    if not engine_config.is_prepared(config) and served.takes_media:
        _refuse_fitting(
            served,
            settings,
            f"{_UNPREPARED}, so it is not known whether images are fitted to them",
        )
        compat.logger().warning(
            "visionaccel: %s. If it was not adjusted, images are encoded in the engine's step unless the configuration "
            "names %s, and an image that cannot be encoded ends the engine.",
            _UNPREPARED,
            engine_config.CONNECTOR,
        )


def _check(config: VllmConfig, served: engine_config.ServedModel, settings: Settings) -> None:
    """Refuse an engine that would run another vision encoder than the one that is asked for."""
    named = ", ".join(served.architectures)
    if not served.own_implementation:
        raise ConfigurationError(
            "VISIONACCEL_BACKEND is set, but --model-impl asks for another library's implementation of the model.",
            hint="Leave --model-impl at auto, or unset VISIONACCEL_BACKEND.",
        )
    if engine_config.pools(config) and (lacking := missing(Feature.POOLING)):
        raise ConfigurationError(
            f"pooling models cannot be served on vLLM {releases.release()}: {'; '.join(lacking)}.",
            hint="Unset VISIONACCEL_BACKEND to serve this model with vLLM's own encoder.",
        )
    if served.replaces is None:
        raise ConfigurationError(
            f"VISIONACCEL_BACKEND is set, but the vision encoder of {named} is not implemented.",
            hint="Unset it to serve this model with vLLM's own encoder. "
            f"Implemented: {', '.join(architectures.ARCHITECTURES)}.",
        )
    if not served.takes_media:
        return
    from visionaccel.integrations.vllm.encoder_source import implemented_epsilon  # not in every process of vLLM
    from visionaccel.integrations.vllm.processing import changed_size

    if served.epsilon is not None and served.epsilon != (epsilon := implemented_epsilon(served)):
        raise ConfigurationError(
            f"the served configuration sets {architectures.ARCHITECTURES[served.replaces].epsilon}={served.epsilon} "
            f"for the vision encoder too, and only {epsilon} is implemented.",
            hint="Drop that override, or unset VISIONACCEL_BACKEND.",
        )
    changed = changed_size(engine_config.processor_options(config.model_config), served.vision or {})
    if changed is not None:
        raise ConfigurationError(
            f"--mm-processor-kwargs sets {changed}, which is not what the served model's vision encoder takes.",
            hint="Leave patch_size, temporal_patch_size and merge_size alone.",
        )
    if engine_config.adapts_tower(config):
        raise ConfigurationError(
            "--enable-tower-connector-lora applies LoRA adapters to vLLM's own vision encoder, and "
            "VISIONACCEL_BACKEND replaces that encoder.",
            hint="Drop --enable-tower-connector-lora: adapters then apply to the language model alone. Or merge the "
            "adapter into the checkpoint, or unset VISIONACCEL_BACKEND.",
        )
    if engine_config.without_python_processor():
        _refuse_fitting(served, settings, "with VLLM_USE_RUST_FRONTEND, images are not fitted to them")
        if engine_config.pools(config) and not serving.takes_request_errors():
            raise ConfigurationError(
                "pooling models cannot be served with VLLM_USE_RUST_FRONTEND on vLLM "
                f"{releases.release()}: only its Python front end reports an image that failed as an error.",
                hint="Unset VLLM_USE_RUST_FRONTEND, or unset VISIONACCEL_BACKEND.",
            )


def _warn_of_rust() -> None:
    """Say what this package does not do where vLLM prepares images and answers clients outside of Python."""
    if not engine_config.without_python_processor():
        return
    reasons = "" if serving.takes_request_errors() else " Clients get no reason for a failed image; it is in the log."
    compat.logger().warning(
        "visionaccel: with VLLM_USE_RUST_FRONTEND, requests do not pass the Python front end. Options of requests "
        "(mm_processor_kwargs) and NaN in images are not checked there, image processing is not timed, and /metrics "
        "does not show the encoder's metrics.%s",
        reasons,
    )


def _refuse_fitting(served: engine_config.ServedModel, settings: Settings, reason: str) -> None:
    """Refuse a bundle whose programs need images to be fitted, where they would not be."""
    from visionaccel.integrations.vllm.encoder_source import grids_of  # only where images may not be fitted

    grids = grids_of(served, settings)
    if grids is not None and not (grids.rest and settings.fit == "none"):
        taken = "; ".join(map(str, grids.coverages))
        raise ConfigurationError(
            f"the programs of {settings.bundle} take {taken} (height x width in patches), but {reason}.",
            hint="Start vLLM by `vllm serve` or `LLM(...)` with its Python front end, use a bundle with a dynamic "
            "program, or set VISIONACCEL_FIT=none and VISIONACCEL_FALLBACK.",
        )
