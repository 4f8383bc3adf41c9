"""Products with weights packed by oneDNN: torch's private operators for them, and a check that they work.

torch.compile calls these operators for layers with frozen weights; torch has no public names for them. In another
release of torch they may be missing, or behave differently.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.safe_text import safe_logger

logger = safe_logger(__name__)

PACKED_FOR = 4096
"""Number of rows that the packed layout is optimised for. It works for any number."""


class PackedWeight:
    """A copy of a weight [out, in] in oneDNN's layout, and of a bias [out]. Call `why_not_packed` first."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, rows: int = PACKED_FOR) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        # A copy: the original may keep the whole file mapped, with the weights that were packed.
        self._bias = None if bias is None else bias.clone()

    def unary(self, x: torch.Tensor, then: str = "none", algorithm: str = "") -> torch.Tensor:
        """Return x @ weight.T + bias for x [rows, in], after `none`, `swish` or, with algorithm `none`, `gelu`."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, then, [], algorithm)
        return result

    def binary(self, x: torch.Tensor, other: torch.Tensor, then: str) -> torch.Tensor:
        """Return x @ weight.T + bias for x [rows, in], after `add` or `mul` with `other` [rows, out]."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, then)
        return result


@cache
def why_not_packed(dtype: torch.dtype, device: str = "cpu") -> str | None:
    """Return why weights of that dtype cannot be packed on that device, and log it once; None if they can."""
    if torch.device(device).type != "cpu":
        return "only oneDNN on the CPU packs weights"
    reason = _why_not_packed(dtype)
    if reason is not None:
        logger.info("Weights of %s are not packed, which makes products slower: %s.", dtype, reason)
    return reason


def _why_not_packed(dtype: torch.dtype) -> str | None:
    """Compare packed products of small matrices with plain ones."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch was built without oneDNN"
    if dtype == torch.bfloat16 and not has_bfloat16():
        return "this CPU has no instructions for bfloat16"
    rng = torch.Generator().manual_seed(0)
    x, weight, bias, other = (
        torch.randn(shape, generator=rng).to(dtype) for shape in ((5, 24), (16, 24), (16,), (5, 16))
    )
    with torch.inference_mode():
        plain = functional.linear(x.float(), weight.float(), bias.float())
        try:
            packed = PackedWeight(weight, bias)
            pairs = (
                (packed.unary(x), plain),
                (PackedWeight(weight).unary(x), functional.linear(x.float(), weight.float())),
                (packed.unary(x, "swish"), functional.silu(plain)),
                (packed.unary(x, "gelu", "none"), functional.gelu(plain)),
                (packed.binary(x, other, "mul"), plain * other.float()),
                (packed.binary(x, other, "add"), plain + other.float()),
            )
        except (AttributeError, RuntimeError, TypeError) as error:
            return f"torch {torch.__version__} does not offer oneDNN's packed products: {error}"
    bound = 1e-4 if dtype == torch.float32 else 3e-2
    if not all(torch.allclose(ours.float(), exact, rtol=bound, atol=bound) for ours, exact in pairs):
        return f"oneDNN's packed products of torch {torch.__version__} differ from plain ones"
    return None
