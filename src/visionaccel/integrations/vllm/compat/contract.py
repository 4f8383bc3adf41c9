"""What each feature relies on in vLLM, as data: names that vLLM does not promise to keep.

This table feeds the check at the start (`checking`), `visionaccel doctor`, the tests and docs/compatibility.md. A row
that differs between releases names alternatives instead of version numbers: one of them is enough.
"""

from __future__ import annotations

from collections.abc import Mapping

from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES, Architecture
from visionaccel.integrations.vllm.compat.contract_rows import WITHOUT, AnyOf, Entry, Feature, Need, Use, needs
from visionaccel.integrations.vllm.compat.contract_rows import need as _need

__all__ = [
    "BY_OUR_SCHEDULER", "CONTRACT", "ENTRIES", "FAILED_REQUESTS", "MODEL_CONTRACT", "WITHOUT", "AnyOf", "Entry",
    "Feature", "Need", "Use", "entries_of", "needs",
]  # fmt: skip

_ARGUMENTS = "vllm.engine.arg_utils:EngineArgs"
_REGISTRY = "vllm.model_executor.models.registry"
_PARSER = "vllm.multimodal.parse:MultiModalDataParser"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_ASYNC = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
_STEP = "vllm.v1.core.sched.output"
_CACHE = "vllm.v1.core.encoder_cache_manager:EncoderCacheManager"
_KEYS = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_REQUEST = "vllm.v1.request:Request"
_STATUS = "vllm.v1.request:RequestStatus"
_ENGINE = "vllm.v1.engine"
_RESULT = f"{_ENGINE}.output_processor:RequestState.make_request_output"
_CONNECTOR = "vllm.distributed.ec_transfer.ec_connector.base"
_TRANSFER = "vllm.distributed.ec_transfer"
_SERVING = "vllm.entrypoints.generate.base.serving"
_PARALLEL = "vllm.distributed.parallel_state"

_CONFIGURATION: tuple[Entry, ...] = (
    _need("patch", f"{_ARGUMENTS}.create_engine_config"),
    _need("patch", "vllm.plugins:load_general_plugins"),
    _need("patch", "vllm.plugins:plugins_loaded"),
    _need("read", _ARGUMENTS, has="enable_mm_embeds"),
    _need(
        "read",
        "vllm.config:VllmConfig",
        has="model_config device_config load_config scheduler_config parallel_config ec_transfer_config "
        "kv_transfer_config lora_config additional_config instance_id",
    ),
    _need("read", "vllm.config:LoRAConfig", has="enable_tower_connector_lora", optional=True),
    _need(
        "read",
        "vllm.config:ModelConfig",
        has="model revision architectures is_multimodal_model model_impl dtype hf_config",
        mentions="_model_info",
    ),
    _need("read", f"{_REGISTRY}:_ModelInfo", has="architecture"),
    _need("call", "vllm.config.load:LoadConfig", has="load_format download_dir"),
    _need("call", "vllm.model_executor.model_loader:get_model_loader", "load_config"),
    _need(
        "call",
        "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights",
        "model_name_or_path subfolder revision fall_back_to_pt allow_patterns_overrides",
    ),
    _need(
        "call",
        "vllm.model_executor.model_loader.weight_utils:maybe_download_from_modelscope",
        "model revision",
    ),
    _need("call", "vllm.config:ModelConfig.get_multimodal_config"),
    _need("call", "vllm.config.multimodal:MultiModalConfig.get_limit_per_prompt", "modality"),
    _need("read", "vllm.config:DeviceConfig", has="device"),
    _need(
        "read",
        "vllm.config:ParallelConfig",
        has="_api_process_count _api_process_rank",
        optional=True,
    ),
)

_ITEMS: tuple[Entry, ...] = (
    _need("read", "vllm.multimodal.inputs:MultiModalFeatureSpec", has="data modality identifier mm_position"),
    _need("read", "vllm.multimodal.inputs:MultiModalFieldElem", has="data"),
    _need("read", "vllm.multimodal.inputs:PlaceholderRange", has="offset length"),
    _need("read", _REQUEST, has="request_id mm_features num_computed_tokens arrival_time"),
    _need(
        "read",
        f"{_STEP}:SchedulerOutput",
        has="scheduled_encoder_inputs num_scheduled_tokens free_encoder_mm_hashes",
    ),
)

# Every image request passes these, whether or not images are fitted.
_REQUESTS: tuple[Entry, ...] = (
    _need("read", "vllm.multimodal.processing:BaseProcessingInfo", has="ctx"),
    _need("read", "vllm.multimodal.processing:InputProcessingContext", has="model_config"),
    _need("read", "vllm.config.multimodal:MultiModalConfig", has="mm_processor_kwargs"),
    _need("read", "vllm.config.multimodal:MultiModalConfig", has="mm_device_do_normalize", optional=True),
    _need("read", "vllm.multimodal.processing:ProcessorInputs", has="hf_processor_mm_kwargs"),
    _need("subclass", "vllm.exceptions:VLLMValidationError", optional=True),
)

_INLINE: tuple[Entry, ...] = (
    *_CONFIGURATION,
    *_REQUESTS,
    _need("call", f"{_REGISTRY}:_ModelRegistry.register_model", "model_arch model_cls"),
    _need("read", f"{_REGISTRY}:_ModelRegistry", has="models"),
    _need("read", f"{_REGISTRY}:_LazyRegisteredModel", has="module_name"),
    _need("call", f"{_REGISTRY}:_LazyRegisteredModel.load_model_cls"),
    _need("read", "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model"),
    _need("read", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.profile_run"),
    _need("read", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights"),
    _need("call", "vllm.model_executor.model_loader.reload:finalize_layerwise_reload"),
    _need("read", "vllm:envs"),
    _need("call", "vllm.multimodal:MULTIMODAL_REGISTRY.register_processor", "processor info dummy_inputs"),
    _need("read", "vllm.multimodal.registry:_ProcessorFactories", has="info processor dummy_inputs"),
    _need("call", f"{_PARALLEL}:model_parallel_is_initialized"),
    _need("call", f"{_PARALLEL}:get_tensor_model_parallel_rank"),
    _need("call", f"{_TRANSFER}:has_ec_transfer"),
    _need("call", f"{_TRANSFER}:get_ec_transfer"),
    _need("read", f"{_CONNECTOR}:ECConnectorBase", has="_connector_metadata is_producer"),
)

_FITTING: tuple[Entry, ...] = (
    _need("call", "vllm.multimodal.processing:InputProcessingContext.get_mm_config"),
    _need("call", "vllm.multimodal.parse:ImageSize", "width height"),
    _need("patch", f"{_PARSER}._parse_image_data", "data"),
    _need("patch", f"{_PARSER}._parse_video_data", "data"),
    _need("call", f"{_PARSER}.is_embeddings", "data"),
    _need("read", "vllm.multimodal.parse:ImageProcessorItems", has="data"),
)

_CONTAINMENT: tuple[Entry, ...] = (
    *_ITEMS,
    _need("read", "vllm.config:SchedulerConfig", has="scheduler_cls async_scheduling"),
    _need("subclass", _SCHEDULER, has="requests encoder_cache_manager kv_cache_manager ec_connector"),
    _need("subclass", _ASYNC),
    _need("override", f"{_SCHEDULER}.schedule"),
    _need("override", f"{_SCHEDULER}.update_from_output", "scheduler_output model_runner_output"),
    _need("override", f"{_SCHEDULER}.shutdown"),
    _need("call", f"{_SCHEDULER}.finish_requests", "request_ids finished_status"),
    _need("call", f"{_SCHEDULER}.reset_prefix_cache", "reset_running_requests", optional=True),
    _need("read", _STATUS, has="FINISHED_ERROR"),
    _need("read", _REQUEST, has="num_output_tokens trace_headers client_index"),
    _need("read", _REQUEST, has="drop_stale_output", optional=True),
    _need("call", f"{_REQUEST}.is_finished"),
    _need("call", f"{_REQUEST}.get_finished_reason"),
    _need("call", f"{_REQUEST}.take_events"),
    _need("read", f"{_STEP}:SchedulerOutput", has="scheduled_new_reqs scheduled_cached_reqs"),
    _need("read", f"{_STEP}:NewRequestData", has="req_id"),
    _need("read", f"{_STEP}:CachedRequestData", has="resumed_req_ids"),
    _need("read", _CACHE, has="cached freeable num_free_slots"),
    _need("read", _CACHE, has="num_embeds_by_hash", optional=True),
    _need("call", f"{_CACHE}.get_cached_input_ids", "request"),
    _need("call", f"{_CACHE}.free_encoder_input", "request input_id"),
    _need("call", f"{_CACHE}.reset"),
    _need("call", f"{_KEYS}.evict_blocks", "block_ids"),
    _need("read", _KEYS, has="block_pool"),
    _need("read", "vllm.v1.core.block_pool:BlockPool", has="num_gpu_blocks"),
    _need(
        "call",
        f"{_ENGINE}:EngineCoreOutput",
        has="request_id new_token_ids finish_reason stop_reason events trace_headers",
    ),
    _need("call", f"{_ENGINE}:EngineCoreOutputs", has="outputs"),
    _need("patch", f"{_CONNECTOR}:ECConnectorBase.save_caches", "encoder_cache mm_hash"),
    _need("patch", f"{_CONNECTOR}:ECConnectorBase.start_save_caches", optional=True),
)

BY_OUR_SCHEDULER = "the contained scheduler ends it"
FAILED_REQUESTS = AnyOf(
    "how a request ends whose image failed",
    {
        "the connector names it": (
            _need("override", f"{_CONNECTOR}:ECConnectorBase.take_unavailable_requests"),
            _need("read", _SCHEDULER, mentions="take_unavailable_requests"),
        ),
        BY_OUR_SCHEDULER: (
            _need("subclass", _SCHEDULER),
            _need("call", f"{_SCHEDULER}.finish_requests", "request_ids finished_status"),
        ),
    },
)
"""Before 0.30, vLLM's own schedulers do not ask a connector which requests have failed."""

_PIPELINED: tuple[Entry, ...] = (
    *_ITEMS,
    _need(
        "call",
        "vllm.config:ECTransferConfig",
        has="ec_connector ec_role ec_connector_module_path is_ec_consumer",
    ),
    _need(
        "read",
        "vllm.config.multimodal:MultiModalConfig",
        has="enable_mm_embeds video_pruning_rate mm_processor_cache_type",
    ),
    _need("read", "vllm.config.multimodal:MultiModalConfig", has="allow_missing_mm_embeddings", optional=True),
    _need("read", "vllm.config:ParallelConfig", has="distributed_executor_backend"),
    _need(
        "subclass",
        f"{_CONNECTOR}:ECConnectorBase",
        implements="start_load_caches save_caches has_cache_item update_state_after_alloc build_connector_meta",
    ),
    _need("subclass", f"{_CONNECTOR}:ECConnectorMetadata"),
    _need("read", f"{_CONNECTOR}:ECConnectorRole", has="SCHEDULER"),
    _need("override", f"{_CONNECTOR}:ECConnectorBase.__init__", "vllm_config role"),
    _need("override", f"{_CONNECTOR}:ECConnectorBase.ensure_cache_available", "request num_computed_tokens"),
    _need("override", f"{_CONNECTOR}:ECConnectorBase.has_cache_item", "identifier"),
    _need("override", f"{_CONNECTOR}:ECConnectorBase.update_state_after_alloc", "request index"),
    _need("override", f"{_CONNECTOR}:ECConnectorBase.build_connector_meta", "scheduler_output"),
    _need("override", f"{_CONNECTOR}:ECConnectorBase.request_finished", "request"),
    _need("override", f"{_CONNECTOR}:ECConnectorBase.start_load_caches", "encoder_cache"),
    _need("override", f"{_CONNECTOR}:ECConnectorBase.save_caches", "encoder_cache mm_hash"),
    _need("override", f"{_CONNECTOR}:ECConnectorBase.shutdown", optional=True),
    _need("call", f"{_CONNECTOR}:ECConnectorBase._get_connector_metadata"),
    _need(
        "read",
        _SCHEDULER,
        mentions="ensure_cache_available has_cache_item update_state_after_alloc build_connector_meta",
    ),
    _need(
        "read",
        "vllm.v1.worker.ec_connector_model_runner_mixin:ECConnectorModelRunnerMixin",
        mentions="bind_connector_metadata start_load_caches",
    ),
    FAILED_REQUESTS,
)

_REASONS: tuple[Entry, ...] = (
    AnyOf(
        "how a failed request's reason reaches its client",
        {
            "the engine's output holds an error": (
                _need("call", f"{_ENGINE}:EngineCoreOutput", has="error"),
                _need("call", "vllm.outputs:RequestError", "code message"),
            ),
            "the API server looks at the stop reason": (
                _need("patch", "vllm.v1.engine.output_processor:RequestState._new_completion_output"),
                _need(
                    "patch",
                    f"{_SERVING}:GenerateBaseServing._raise_if_error",
                    "finish_reason request_id",
                    where_loaded=True,
                ),
                _need("call", f"{_SERVING}:GenerationError", where_loaded=True),
            ),
        },
    ),
)

_POOLING: tuple[Entry, ...] = (
    _need("read", _REQUEST, has="pooling_params"),
    _need("read", "vllm.config:ModelConfig", mentions="runner_type"),
    _need("call", f"{_ENGINE}:EngineCoreOutput", has="pooling_output"),
    AnyOf(
        "how a failed pooling request ends",
        {
            "with its error": (
                _need("patch", _RESULT, "new_token_ids pooling_output finish_reason stop_reason error"),
                _need("call", "vllm.outputs:RequestError", "code message"),
            ),
            "with a result that raises": (
                _need("patch", _RESULT, "new_token_ids pooling_output finish_reason stop_reason"),
                _need("call", f"{_SERVING}:GenerationError", where_loaded=True),
            ),
        },
    ),
)

# Where vLLM answers /metrics from prometheus_client's registry, or its collector for several processes, ours are there.
_METRICS: tuple[Entry, ...] = (
    _need("read", "vllm.v1.metrics.prometheus:get_prometheus_registry", mentions="REGISTRY MultiProcessCollector"),
    _need("patch", "prometheus_client.multiprocess:MultiProcessCollector.collect"),
)


def _of_model(row: Architecture) -> tuple[Entry, ...]:
    """What the in-line mode needs of a model's class, and of its processing classes, which every request passes."""
    model, module = row.model, row.model.partition(":")[0]
    info, processor = f"{model}._processor_factory.info", f"{model}._processor_factory.processor"
    planned = "image_width image_height num_frames do_resize image_processor mm_kwargs"
    return (
        _need("subclass", model, mentions="visual"),
        _need("override", f"{model}.__init__", "vllm_config prefix", mentions=" ".join(row.towers)),
        *(_need("patch", f"{module}:{tower}") for tower in row.towers),
        _need("override", f"{model}.load_weights", "weights"),
        _need("override", f"{model}.embed_input_ids", "input_ids multimodal_embeddings is_multimodal"),
        _need("override", f"{model}.supports_mm_device_do_normalize"),
        _need("override", f"{model}.supports_encoder_tp_data", optional=True),
        _need("override", f"{model}.supports_encoder_cudagraph", optional=True),
        _need("override", f"{model}.supports_tower_connector_lora", optional=True),
        _need("override", f"{model}.lora_skip_prefixes", optional=True),
        _need("read", f"{model}._processor_factory"),
        _need("override", f"{info}.get_supported_mm_limits"),
        _need("override", f"{info}.validate_num_items", "modality num_items"),
        _need("override", f"{info}.get_data_parser"),
        _need("override", f"{info}.get_image_size_with_most_features"),
        AnyOf(
            "the size that vLLM plans an image with",
            {
                "modality": (_need("override", f"{info}._get_vision_info", f"{planned} modality"),),
                "no modality": (_need("override", f"{info}._get_vision_info", planned),),
            },
        ),
        _need("override", f"{processor}.apply", "inputs timing_ctx"),
        _need("override", f"{processor}._get_prompt_updates", "mm_items hf_processor_mm_kwargs out_mm_kwargs"),
    )


def _of_fitting(row: Architecture) -> tuple[Entry, ...]:
    """What fitting needs of a model's processing classes."""
    return (_need("call", f"{row.model}._processor_factory.info.get_image_processor"),)


CONTRACT: Mapping[Feature, tuple[Entry, ...]] = {
    Feature.INLINE: _INLINE,
    Feature.FITTING: _FITTING,
    Feature.CONTAINMENT: _CONTAINMENT,
    Feature.PIPELINED: _PIPELINED,
    Feature.REASONS: _REASONS,
    Feature.METRICS: _METRICS,
    Feature.POOLING: _POOLING,
}
"""What each feature needs of vLLM for every model. Every feature needs the rows of `in-line` as well."""

MODEL_CONTRACT: Mapping[str, Mapping[Feature, tuple[Entry, ...]]] = {
    architecture: {Feature.INLINE: _of_model(row), Feature.FITTING: _of_fitting(row)}
    for architecture, row in ARCHITECTURES.items()
}
"""What features need of the served model's own classes, by architecture."""


def entries_of(feature: Feature, architecture: str | None) -> tuple[Entry, ...]:
    """What a feature needs of vLLM, and of one model's classes."""
    of_model = MODEL_CONTRACT[architecture].get(feature, ()) if architecture is not None else ()
    return (*CONTRACT[feature], *of_model)


ENTRIES: tuple[tuple[Feature, Entry], ...] = tuple(
    (feature, entry)
    for contract in (CONTRACT, *MODEL_CONTRACT.values())
    for feature, entries in contract.items()
    for entry in entries
)
"""Both tables, row by row."""
