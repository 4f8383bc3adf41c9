"""The patch embedding on the host: a convolution whose stride is its kernel, hence one matrix product."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import Array, as_host_tensor, as_numpy
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.program import Precision

__all__ = ["PatchEmbedding"]


class PatchEmbedding:
    """Embeds patches in a given order of tokens.

    With torch the product is oneDNN's over a weight that is packed once; in bfloat16 it takes half the time of float32.
    Without torch it is numpy's, always in float32.

    Args:
        weight: [hidden, patch_width], the kernel as a matrix.
        precision: What the program behind it computes in; bfloat16 also rounds patches and result here. float16
            computes in float32, which CPUs do faster.
        merged: Patches of one token, which stay together.
        use_torch: Whether torch does it; None for where it is installed and can.
    """

    def __init__(
        self, weight: NDArray[Any], precision: Precision, merged: int, *, use_torch: bool | None = None
    ) -> None:
        self._merged, self._hidden = merged, len(weight)
        self._rounded = precision == "bfloat16"
        self._torch = _torch_can(precision) if use_torch is None else use_torch
        if self._torch:
            self._product = _torch_product(weight, "bfloat16" if self._rounded else "float32")
        else:
            exact = weight.astype(ml_dtypes.bfloat16) if self._rounded else weight
            self._weight = np.ascontiguousarray(exact.astype(np.float32).T)

    def __call__(self, patches: Array, order: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings of patches.

        Args:
            patches: float32, float16 or bfloat16 [P, patch_width], numpy or torch, on any device.
            order: int64 [N]; the token that goes to each place.

        Returns:
            float32 [N, merged, hidden], C-contiguous.
        """
        rows = as_numpy(patches)
        # The patches are reordered rather than their embeddings: they are the narrower rows.
        rows = np.take(rows.reshape(len(order), -1), order, axis=0).reshape(rows.shape)
        if self._torch:
            embedded = as_numpy(self._product(as_host_tensor(rows, "bfloat16" if self._rounded else "float32")))
        else:
            exact = rows.astype(ml_dtypes.bfloat16) if self._rounded else rows
            embedded = exact.astype(np.float32, copy=False) @ self._weight
            if self._rounded:
                embedded = embedded.astype(ml_dtypes.bfloat16)
        return embedded.astype(np.float32, copy=False).reshape(len(order), self._merged, self._hidden)


def _torch_can(precision: Precision) -> bool:
    """Whether torch is installed and, for bfloat16, this processor has the instructions that it needs."""
    return find_spec("torch") is not None and (precision != "bfloat16" or has_bfloat16())


def _torch_product(weight: NDArray[Any], dtype: str) -> Any:
    """A function from [P, patch_width] to [P, hidden], both tensors of `dtype`."""
    import torch

    from visionaccel.core.packed_products import PackedWeight, why_not_packed

    matrix = as_host_tensor(np.ascontiguousarray(weight), dtype)
    # Packed products are free of MKL, which on some processors takes twice as long.
    packed = PackedWeight(matrix) if why_not_packed(matrix.dtype) is None else None

    def product(x: Any) -> Any:
        with torch.inference_mode():
            return torch.nn.functional.linear(x, matrix) if packed is None else packed.unary(x)

    return product
