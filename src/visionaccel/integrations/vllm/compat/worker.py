"""What is used of vLLM's workers: what they are doing, their EC connector, and the cores that vLLM binds them to."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Any

from visionaccel.core.cores import ALL, Host, parse_cores, process_cores, shown_cores

if TYPE_CHECKING:
    from torch import nn

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


def profiling() -> bool:
    """Return whether this call comes from vLLM's profiling run, which discards its results.

    Only the stack shows it. Both runners encode dummy images in `profile_run`, and only there.
    """
    return _called_by("profile_run", "vllm.v1.worker.")


def loading() -> bool:
    """Return whether this call comes from a loader that makes a model, not from a later update of its weights."""
    return _called_by("load_model", "vllm.model_executor.model_loader.")


def finish_reload(model: nn.Module, model_config: Any) -> None:
    """Do what vLLM's `reload_weights` does after `load_weights`, before an error leaves the latter.

    It removed the layers' tensors, and restores those that were not loaded; without them, the next step raises even for
    text. Not done for an update in parts, which its caller ends by another call.
    """
    if _called_by("reload_weights", "vllm.v1.worker."):
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(model, model_config)


def _called_by(method: str, modules: str) -> bool:
    """Return whether the stack has a method of a class derived from one in vLLM's modules with this prefix."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == method and any(
            kind.__module__.startswith(modules) for kind in type(frame.f_locals.get("self")).__mro__
        ):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def step_timeout() -> float:
    """Return the seconds that a step may take before vLLM ends the engine."""
    from vllm import envs

    return float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def worker_connector() -> Any:
    """Return this worker's EC connector, or None."""
    from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer

    return get_ec_transfer() if has_ec_transfer() else None


def step_metadata() -> Any:
    """Return this step's metadata for this worker's EC connector, a new object each time; None without a connector."""
    connector = worker_connector()
    return None if connector is None else connector._connector_metadata


def first_of_its_group() -> bool:
    """Return whether this worker is the first of its tensor-parallel group, whose workers encode the same images."""
    from vllm.distributed import parallel_state

    return not parallel_state.model_parallel_is_initialized() or parallel_state.get_tensor_model_parallel_rank() == 0


def encoder_host(device: str, *, in_step: bool) -> Host | None:
    """Return the cores that a language model uses on the CPU; None if it is on another device.

    With `in_step`, the encoder runs in a worker's step, during which that worker's language model waits.
    """
    if device.partition(":")[0] != "cpu":
        return None
    bind = os.environ.get(_BIND, "auto")
    try:
        lists = [cores for part in bind.split("|") if (cores := parse_cores(part)) != ALL]
    except ValueError:  # `auto` and `nobind`, too; vLLM itself refuses what is not a list
        lists = []
    taken = frozenset().union(*lists)
    if not in_step:
        why = f"{_BIND} lists none for the language model"
        if taken:
            why = f"{_BIND}={bind} binds the language model to {shown_cores(taken)}"
        return Host(started_cores(), taken, why)
    bound = process_cores()
    # A worker that is bound to none of the lists cannot know of other workers.
    taken -= next((cores for cores in lists if bound <= cores), taken)
    why = "the language model waits while images are encoded"
    if taken:
        why += f", and {_BIND}={bind} binds other workers to {shown_cores(taken)}"
    return Host(started_cores(), taken, why)


def started_cores() -> frozenset[int]:
    """Return the cores that this process had before OpenMP bound its main thread to some of them.

    vLLM starts its workers with OpenMP's variables. OpenMP then binds a worker and the threads it starts when torch is
    loaded, but not the engine that started the worker.
    """
    own, parent = process_cores(), multiprocessing.parent_process()
    if os.environ.get(_BIND) == "nobind" or parent is None or parent.pid is None:
        return own
    try:
        return own | process_cores(parent.pid)
    except OSError:  # the parent has ended
        return own
