"""Cores of the processor: which vLLM binds a language model on the CPU to, and which its processes started with."""

from __future__ import annotations

import multiprocessing
import os

from visionaccel.core.cores import ALL, Host, parse_cores, process_cores, shown_cores

__all__ = ["encoder_host", "started_cores"]

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


def encoder_host(device: str, *, in_step: bool) -> Host | None:
    """What an encoder of this process finds on the machine's cores, for `visionaccel.service.assembly`.

    Args:
        device: The language model's device.
        in_step: The encoder runs in a worker's step, during which that worker's language model waits.

    Returns:
        None if the language model is not on the CPU.
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

    vLLM starts its workers with OpenMP's variables for that, and OpenMP binds them when torch is loaded, so that
    whatever a worker's main thread starts later is bound there too. The engine that started it is not.
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
