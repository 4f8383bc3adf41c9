"""A worker's insides: what it is doing, its EC connector, and the cores of the processor that vLLM binds it to."""

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
    """Whether this call comes from vLLM's profiling run, whose results are thrown away.

    Both runners encode dummy images in `profile_run` alone. Only that frame on the stack proves it: what a connector
    has received says nothing certain about the step.
    """
    return _called_by("profile_run", "vllm.v1.worker.")


def loading() -> bool:
    """Whether this call comes from a loader that makes a model, and not from a later update of its weights."""
    return _called_by("load_model", "vllm.model_executor.model_loader.")


def finish_reload(model: nn.Module, model_config: Any) -> None:
    """Before an error leaves `load_weights`: do what vLLM's `reload_weights` does once that has returned.

    It has taken the layers' tensors away, and puts those back that were not loaded. Without them the next step raises,
    for text too. An update in parts is left alone: its caller ends it by another call. All other
    weights of the model are loaded.
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


def encoder_host(device: str, *, in_step: bool) -> Host | None:
    """Which cores an encoder of this process finds taken by a language model; None if that is not on the CPU.

    Args:
        device: The language model's device.
        in_step: The encoder runs in a worker's step, during which that worker's language model waits.
    """
    if device.partition(":")[0] != "cpu":
        return None
    bind = os.environ.get(_BIND, "auto")
    lists = _lists(bind)
    if not in_step:
        taken = frozenset().union(*lists)
        why = (
            f"{_BIND}={bind} binds the language model to {shown_cores(taken)}"
            if taken
            else f"{_BIND} lists none for the language model"
        )
        return Host(started_cores(), taken, why)
    bound = process_cores()
    own = next((cores for cores in lists if bound <= cores), None)
    # A worker that none of the lists binds has no others to make way for, as far as is known.
    taken = frozenset().union(*lists) - own if own is not None else frozenset()
    why = "the language model waits while images are encoded"
    if taken:
        why += f", and {_BIND}={bind} binds other workers to {shown_cores(taken)}"
    return Host(started_cores(), taken, why)


def started_cores() -> frozenset[int]:
    """Cores that this process had before OpenMP bound its main thread to some of them, or to one.

    vLLM starts its workers with OpenMP's variables for that, and OpenMP binds them when torch is loaded, so that all
    that a worker's main thread starts later is bound there too. The engine that started it is not.
    """
    own, parent = process_cores(), multiprocessing.parent_process()
    if os.environ.get(_BIND) == "nobind" or parent is None or parent.pid is None:
        return own
    try:
        return own | process_cores(parent.pid)
    except OSError:  # It ended.
        return own


def _lists(bind: str) -> list[frozenset[int]]:
    """The cores of each worker, if the user lists them; vLLM itself refuses what cannot be read."""
    try:
        found = [parse_cores(part) for part in bind.split("|")]
    except ValueError:  # `auto` and `nobind` too
        return []
    return [cores for cores in found if cores != ALL]
