"""Attention of a batch of segments, each within itself."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch.nn import functional

__all__ = ["Attention", "eager", "sdpa"]

Attention: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From query, key and value [segments, heads, rows, head_dim] to [segments, heads, rows, head_dim]."""


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The fused kernel of torch."""
    return functional.scaled_dot_product_attention(query, key, value)


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Products and a softmax in float32, as transformers' `eager_attention_forward`; holds all scores at once."""
    scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
    return torch.matmul(functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)
