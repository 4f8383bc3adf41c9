"""Names of the tower's weights."""

from __future__ import annotations

from collections.abc import Iterator

from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.families.qwen2_5_vl.signature import PATCH_KERNEL

__all__ = ["weight_names"]

_LINEARS = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def weight_names(config: VisionConfig) -> Iterator[str]:
    """Names of all weights of a tower, below the prefix."""
    yield PATCH_KERNEL
    yield "merger.ln_q.weight"
    for linear in ("merger.mlp.0", "merger.mlp.2"):
        yield from (f"{linear}.weight", f"{linear}.bias")
    for block in range(config.depth):
        yield from (f"blocks.{block}.norm1.weight", f"blocks.{block}.norm2.weight")
        for linear in _LINEARS:
            yield from (f"blocks.{block}.{linear}.weight", f"blocks.{block}.{linear}.bias")
