"""The operations of a block: linear layers, whose weights oneDNN packs if the CPU supports it, and attention."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch.nn import functional

from visionaccel.core.packed_products import PackedWeight, why_not_packed
from visionaccel.core.tower_spec import ActivationKind

ACTIVATIONS: Mapping[ActivationKind, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: torch.sigmoid(x * 1.702).mul_(x),
    "silu": functional.silu,
}

_FUSED: Mapping[ActivationKind, tuple[str, str]] = {"gelu": ("gelu", "none"), "silu": ("swish", "")}
"""Activations that oneDNN applies within a product."""


class Linear(ABC):
    """x @ weight.T + bias followed by the tower's next step, so that an implementation can fuse both.

    Tensors are [rows, in] in, [rows, out] out, in the dtype of the weight.
    """

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Only the product and the bias: x @ weight.T + bias."""

    def activated(self, x: torch.Tensor, kind: ActivationKind) -> torch.Tensor:
        """Return the product plus the bias, after an activation."""
        return ACTIVATIONS[kind](self(x))

    @abstractmethod
    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Return the product plus the bias, times a factor of the same shape."""

    @abstractmethod
    def plus(self, x: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        """Return the product plus the bias, plus a term of the same shape."""


class PlainLinear(Linear):
    """torch's linear layer, on any device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)

    def activated(self, x: torch.Tensor, kind: ActivationKind) -> torch.Tensor:
        return functional.silu(self(x), inplace=True) if kind == "silu" else super().activated(x, kind)

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self(x).mul_(factor)

    def plus(self, x: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        return self(x).add_(term)


class PackedLinear(Linear):
    """oneDNN's linear layer, with a packed weight and the next step fused into the product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._packed = PackedWeight(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._packed.unary(x)

    def activated(self, x: torch.Tensor, kind: ActivationKind) -> torch.Tensor:
        return self._packed.unary(x, *_FUSED[kind]) if kind in _FUSED else super().activated(x, kind)

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self._packed.binary(x, factor, "mul")

    def plus(self, x: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        return self._packed.binary(x, term, "add")


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Return the fastest linear layer for a weight [out, in] and a bias [out], of one dtype and device.

    The weight given is not kept if it is packed.
    """
    if why_not_packed(weight.dtype, str(weight.device)) is None:
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


Attention: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From query, key and value [segments, heads, rows, head_dim] to [segments, heads, rows, head_dim]."""


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute attention with torch's fused kernel."""
    return functional.scaled_dot_product_attention(query, key, value)


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute attention in float32, as transformers' `eager_attention_forward` does; keeps all scores in memory."""
    scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
    return torch.matmul(functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)
