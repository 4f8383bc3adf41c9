"""Linear layers: packed once by oneDNN where the CPU has it, otherwise torch's own."""

import logging
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from torch.nn import functional

__all__ = ["Linear", "PackedLinear", "PlainLinear", "make_linear", "why_not_packed"]

logger = logging.getLogger(__name__)

_PACKED_FOR = 4096
"""Rows that the packed layout is chosen for. It serves any number; this one only picks between blockings."""


class Linear(ABC):
    """x @ weight.T + bias with what the tower does next, so that an implementation may do both at once.

    Tensors are [rows, in] in, [rows, out] out, in the dtype of the weight.
    """

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product and the bias alone: x @ weight.T + bias."""

    @abstractmethod
    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """The SiLU of it."""

    @abstractmethod
    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """The exact GELU of it."""

    @abstractmethod
    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """It, times a factor of its shape."""

    @abstractmethod
    def plus(self, x: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        """It, plus a term of its shape."""


class PlainLinear(Linear):
    """torch's own, on any device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weight, self._bias)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(self(x), inplace=True)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self(x))

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self(x).mul_(factor)

    def plus(self, x: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        return self(x).add_(term)


class PackedLinear(Linear):
    """oneDNN's, its weight in a blocked layout that is made once, and the next step fused into the product.

    These are the operators that torch.compile's freezing of weights calls. torch declares no public name for them, so
    `why_not_packed` tries them before any weight depends on them.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR)
        # A copy: as it was read it may keep the whole file mapped, with every weight that was packed.
        self._bias = None if bias is None else bias.clone()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._unary(x, "none", "")

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        return self._unary(x, "swish", "")

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        return self._unary(x, "gelu", "none")

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self._binary(x, factor, "mul")

    def plus(self, x: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        return self._binary(x, term, "add")

    def _unary(self, x: torch.Tensor, name: str, algorithm: str) -> torch.Tensor:
        product: Any = torch.ops.mkldnn._linear_pointwise
        result: torch.Tensor = product(x, self._weight, self._bias, name, [], algorithm)
        return result

    def _binary(self, x: torch.Tensor, other: torch.Tensor, name: str) -> torch.Tensor:
        product: Any = torch.ops.mkldnn._linear_pointwise.binary
        result: torch.Tensor = product(x, other, self._weight, self._bias, name)
        return result


@cache
def why_not_packed(dtype: torch.dtype, device: str) -> str | None:
    """Why weights of that dtype are not packed on that device; None where they can be. Says so in the log, once."""
    if torch.device(device).type != "cpu":
        return "only oneDNN on the CPU packs weights"
    reason = _why_not_packed(dtype)
    if reason is not None:
        logger.info("Weights are not packed, which makes products slower: %s.", reason)
    return reason


def _why_not_packed(dtype: torch.dtype) -> str | None:
    """What a small trial showed."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch was built without oneDNN"
    rng = torch.Generator().manual_seed(0)
    x, weight, bias, other = (
        torch.randn(shape, generator=rng).to(dtype) for shape in ((5, 24), (16, 24), (16,), (5, 16))
    )
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no bfloat16 arithmetic that oneDNN uses"
        packed, plain = PackedLinear(weight, bias), PlainLinear(weight.float(), bias.float())
        wide, factor = x.float(), other.float()
        pairs = (
            (packed(x), plain(wide)),
            (PackedLinear(weight, None)(x), PlainLinear(weight.float(), None)(wide)),
            (packed.silu(x), plain.silu(wide)),
            (packed.gelu(x), plain.gelu(wide)),
            (packed.times(x, other), plain.times(wide, factor)),
            (packed.plus(x, other), plain.plus(wide, factor)),
        )
        # Of another version of torch the names may be the same and the meaning not.
        bound = 1e-4 if dtype == torch.float32 else 3e-2
        if not all(torch.allclose(ours.float(), exact, rtol=bound, atol=bound) for ours, exact in pairs):
            return f"oneDNN's packed products of torch {torch.__version__} are not what is expected"
    except (AttributeError, RuntimeError) as error:
        return f"torch {torch.__version__} does not offer oneDNN's packed products: {error}"
    return None


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """The fastest linear layer for a weight [out, in] and a bias [out], of one dtype and device.

    The weight given is not kept if it is packed.
    """
    if why_not_packed(weight.dtype, str(weight.device)) is None:
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)
