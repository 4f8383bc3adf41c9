"""A worker's insides: the vision tower's place in the model, and the EC connector."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["first_of_its_group", "in_step", "swapped_tower", "worker_connector"]


@contextmanager
def swapped_tower(base: type, make: Callable[..., nn.Module]) -> Iterator[None]:
    """While the constructor of `base` runs, `make` makes its vision tower: nothing of the stock one is allocated."""
    module: Any = sys.modules[base.__module__]
    stock = module.Qwen2_5_VisionTransformer
    module.Qwen2_5_VisionTransformer = make
    try:
        yield
    finally:
        module.Qwen2_5_VisionTransformer = stock


def in_step() -> bool:
    """In a worker with an EC connector: whether a step is being computed, and not a dummy run at the start."""
    from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer

    return has_ec_transfer() and get_ec_transfer()._connector_metadata is not None


def worker_connector() -> Any:
    """This worker's EC connector, or None."""
    from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer

    return get_ec_transfer() if has_ec_transfer() else None


def first_of_its_group() -> bool:
    """Whether this worker is the first of those that share a model's layers, and that all encode the same images."""
    from vllm.distributed import parallel_state

    return not parallel_state.model_parallel_is_initialized() or parallel_state.get_tensor_model_parallel_rank() == 0
