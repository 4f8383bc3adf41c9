"""A worker's insides: what it is doing, and its EC connector."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "connector_metadata", "finish_reload", "first_of_its_group", "loading", "profiling", "step_metadata",
    "step_timeout", "worker_connector",
]  # fmt: skip


def profiling() -> bool:
    """Whether this call comes from vLLM's profiling run, whose results are thrown away.

    Both runners encode dummy images in `profile_run` alone. Only that frame on the stack proves it: what a connector
    has or has not been told says nothing certain about the step.
    """
    return _called_by("profile_run", "vllm.v1.worker.")


def loading() -> bool:
    """Whether this call comes from a loader that makes a model, and not from a later update of its weights."""
    return _called_by("load_model", "vllm.model_executor.model_loader.")


def finish_reload(model: nn.Module, model_config: Any) -> None:
    """Before an error leaves `load_weights`: do what vLLM's `reload_weights` does once that has returned.

    It has taken the layers' tensors away, and puts those back that were not loaded. Without them the next step raises,
    whatever it computes. An update in parts is left alone: its caller ends it by a call of its own.

    Args:
        model: The model; all of its other weights are loaded.
        model_config: vLLM's configuration of it.
    """
    if _called_by("reload_weights", "vllm.v1.worker."):
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(model, model_config)


def _called_by(method: str, modules: str) -> bool:
    """Whether a method of a class that derives from one in vLLM's modules of that prefix is on the stack."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == method and any(
            kind.__module__.startswith(modules) for kind in type(frame.f_locals.get("self")).__mro__
        ):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def step_metadata() -> Any:
    """In a worker with an EC connector: what the scheduler sent it for this step, a new object each time."""
    transfer: Any = sys.modules.get("vllm.distributed.ec_transfer")
    if transfer is None or not transfer.has_ec_transfer():  # a worker with a connector has imported it
        return None
    return transfer.get_ec_transfer()._connector_metadata


def connector_metadata(connector: Any) -> Any:
    """What the scheduler's end of an EC connector sent to this end for the step."""
    return connector._get_connector_metadata()


def step_timeout() -> float:
    """Seconds after which vLLM ends an engine whose workers have not ended a step."""
    from vllm import envs

    return float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def worker_connector() -> Any:
    """This worker's EC connector, or None."""
    from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer

    return get_ec_transfer() if has_ec_transfer() else None


def first_of_its_group() -> bool:
    """Whether this worker is the first of those that share a model's layers, and that all encode the same images."""
    from vllm.distributed import parallel_state

    return not parallel_state.model_parallel_is_initialized() or parallel_state.get_tensor_model_parallel_rank() == 0
