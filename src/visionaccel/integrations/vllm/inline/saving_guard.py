"""Keeps what could not be encoded from leaving an encoder instance through vLLM's encoder-cache (EC) connector."""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any

import torch

from visionaccel.integrations.vllm import compat

__all__ = ["guard_saving"]


def guard_saving(connector: Any) -> None:
    """Have a worker's EC connector publish no embedding that is all zeros or has values that are not finite.

    The tower answers zeros for an item that it could not encode; a real encoder never does. vLLM's runners hand every
    new embedding to `save_caches`, the first runner (V1) and the second alike, before the scheduler hears of a fault.
    `start_save_caches`, which runs before each step, lets a connector publish what is cached from earlier steps, as
    Mooncake's does for requests whose image is already there: it does not see the embeddings that were refused.

    Covered are `ECExampleConnector` and `ECMooncakeConnector` with its store, whose waiting push ends with the failed
    request. Not covered:

    - `ECCPUConnector` publishes nothing faulty either, but its scheduler keeps the blocks that it set aside for the
      refused embedding, and offers that image to no other instance until the engine starts anew.
    - A connector that copies embeddings elsewhere than in these two methods, such as in `get_finished`.
    - An embedding with other values that are wrong: only the encoder's own checks know those.

    Args:
        connector: What `vllm.distributed.ec_transfer.get_ec_transfer()` returns. Guarding it again changes nothing.
    """
    if getattr(connector.save_caches, "guarded", False):
        return
    save, start = connector.save_caches, getattr(connector, "start_save_caches", _nothing)  # not before vLLM 0.30
    refused: dict[str, weakref.ref[torch.Tensor]] = {}

    @functools.wraps(save)
    def save_caches(encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        embedding = encoder_cache[mm_hash]
        if _sound(embedding):
            save(encoder_cache=encoder_cache, mm_hash=mm_hash, **kwargs)
        else:
            refused[mm_hash] = weakref.ref(embedding)
            compat.logger().error("The embedding of %s is faulty and not given to other instances.", mm_hash)

    @functools.wraps(start)
    def start_save_caches(**kwargs: Any) -> None:
        cache = kwargs.get("encoder_cache")
        withheld = {}
        for name, embedding in list(refused.items()):
            if cache and name in cache and cache[name] is embedding():
                withheld[name] = cache.pop(name)
            else:
                del refused[name]  # freed, or encoded again
        try:
            start(**kwargs)
        finally:
            for name, faulty in withheld.items():
                assert cache is not None
                cache.setdefault(name, faulty)  # Requests of this step may still refer to it; they are ended.

    save_caches.guarded = True  # type: ignore[attr-defined]
    connector.save_caches, connector.start_save_caches = save_caches, start_save_caches


def _nothing(**_: Any) -> None:
    """Publishes nothing before a step."""


def _sound(embedding: torch.Tensor) -> bool:
    """Whether an embedding is finite and not all zeros; NaN spreads to both extremes. One pass, no copy."""
    if not embedding.numel():
        return False
    low, high = (float(extreme) for extreme in torch.aminmax(embedding.detach()))
    return math.isfinite(low) and math.isfinite(high) and (low, high) != (0.0, 0.0)
