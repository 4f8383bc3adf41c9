"""Every private name of vLLM that this package relies on.

Run on the releases of `TRIED_RELEASES`, on the last of them in every test. The classes that this package subclasses are
attributes of this module, imported on first use: it must cost nothing in vLLM's processes that need none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from visionaccel.integrations.vllm.compat.architectures import ARCHITECTURES
from visionaccel.integrations.vllm.compat.bound_cores import (
    encoder_host,
    started_cores,
)
from visionaccel.integrations.vllm.compat.checking import missing
from visionaccel.integrations.vllm.compat.engine_config import (
    CONNECTOR,
    ServedModel,
    adapts_tower,
    can_contain,
    ec_connector,
    engine_id,
    impossible_with_connector,
    is_one_of_several_api_servers,
    is_pipelined,
    is_prepared,
    load_plugins,
    load_plugins_again,
    mark_prepared,
    normalises_itself,
    obstacles_to_pipelining,
    on_engine_config,
    pools,
    processor_options,
    receives_embeddings,
    served_by,
    served_model,
    set_processor_options,
    takes_media,
    use_connector,
    use_contained_scheduler,
    use_ec_connector,
    without_python_processor,
)
from visionaccel.integrations.vllm.compat.image_processing import (
    HookedInfo,
    HookedProcessor,
    convert_images,
    errors_for_clients,
    pixel_bounds,
    refuse_videos,
)
from visionaccel.integrations.vllm.compat.mixin import Mixin
from visionaccel.integrations.vllm.compat.registering import (
    architecture_of,
    is_registered,
    is_replaced,
    processing_of,
    register_models,
    stock_class,
    swapped_towers,
    use_model_in_process,
)
from visionaccel.integrations.vllm.compat.releases import (
    TRIED_RELEASES,
    logger,
    release,
    share_log_handlers,
    tried,
    warn_of_untried_release,
)
from visionaccel.integrations.vllm.compat.scheduling import (
    CacheState,
    ScheduledItem,
    StepInFlight,
    answered_with_media,
    append_errors,
    drops_tokens_in_flight,
    encoder_cache_state,
    fail_requests,
    forget_encoder_output,
    forget_prefixes,
    free_in_worker,
    has_embeddings,
    requests_at_stake,
    scheduled_item,
    shows_encoder_cache,
    start_anew,
    step_in_flight,
)
from visionaccel.integrations.vllm.compat.serving import (
    explain_errors,
    explain_pooling_errors,
    on_metrics,
    takes_request_errors,
)
from visionaccel.integrations.vllm.compat.weight_files import (
    remember_load_config,
    require_default_loader,
    settings_folder,
    weight_files,
)
from visionaccel.integrations.vllm.compat.worker import (
    connector_metadata,
    finish_reload,
    first_of_its_group,
    loading,
    profiling,
    step_metadata,
    step_timeout,
    worker_connector,
)

if TYPE_CHECKING:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler as AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler as Scheduler

__all__ = [
    "adapts_tower", "answered_with_media", "append_errors", "architecture_of", "ARCHITECTURES", "CacheState",
    "can_contain", "CONNECTOR", "connector_metadata", "convert_images", "drops_tokens_in_flight", "ec_connector",
    "encoder_cache_state", "encoder_host", "engine_id", "errors_for_clients", "explain_errors",
    "explain_pooling_errors", "fail_requests", "finish_reload", "first_of_its_group", "forget_encoder_output",
    "forget_prefixes", "free_in_worker", "has_embeddings", "HookedInfo", "HookedProcessor",
    "impossible_with_connector", "is_one_of_several_api_servers", "is_pipelined", "is_prepared", "is_registered",
    "is_replaced", "load_plugins", "load_plugins_again", "loading", "logger", "mark_prepared", "missing", "Mixin",
    "normalises_itself", "obstacles_to_pipelining", "on_engine_config", "on_metrics", "pixel_bounds", "pools",
    "processing_of", "processor_options", "profiling", "receives_embeddings", "refuse_videos", "register_models",
    "release", "remember_load_config", "requests_at_stake", "require_default_loader", "scheduled_item",
    "ScheduledItem", "served_by", "served_model", "ServedModel", "set_processor_options", "settings_folder",
    "share_log_handlers", "shows_encoder_cache", "start_anew", "started_cores", "step_in_flight", "step_metadata",
    "step_timeout", "StepInFlight", "stock_class", "swapped_towers", "takes_media", "takes_request_errors", "tried",
    "TRIED_RELEASES", "use_connector", "use_contained_scheduler", "use_ec_connector", "use_model_in_process",
    "warn_of_untried_release", "weight_files", "without_python_processor", "worker_connector",
]  # fmt: skip

_HOMES = {
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "ECConnectorBase": "vllm.distributed.ec_transfer.ec_connector.base",
    "ECConnectorMetadata": "vllm.distributed.ec_transfer.ec_connector.base",
    "ECConnectorRole": "vllm.distributed.ec_transfer.ec_connector.base",
    "ImageSize": "vllm.multimodal.parse",
    "MULTIMODAL_REGISTRY": "vllm.multimodal",
    "Scheduler": "vllm.v1.core.sched.scheduler",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
