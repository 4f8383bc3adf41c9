"""The patch embedding on the host: a convolution whose stride is its kernel, hence one matrix product.

Where a tower normalises the embedded patches or adds learned positions to them, the host does that as well: positions
depend on a frame's height and width alone, so that no table of them has to be in the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import Array, as_host_tensor, as_numpy
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.program import Precision
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import Linear, Norm, TowerSpec
from visionaccel.errors import CheckpointError
from visionaccel.towers.tables import Tables

__all__ = ["HostEmbedding", "PatchEmbedding"]


class PatchEmbedding:
    """Embeds patches in a given order of tokens.

    With torch the product is oneDNN's over a weight that is packed once; in bfloat16 it takes half the time of float32.
    Without torch it is numpy's, always in float32.

    Args:
        weight: [hidden, patch_width], the kernel as a matrix.
        precision: What the program behind it computes in; bfloat16 also rounds patches and result here. float16
            computes in float32, which CPUs do faster.
        merged: Patches of one token, which stay together.
        bias: [hidden], added before the result is rounded; None for none.
        use_torch: Whether torch does it; None for where it is installed and can.
    """

    def __init__(
        self,
        weight: NDArray[Any],
        precision: Precision,
        merged: int,
        *,
        bias: NDArray[Any] | None = None,
        use_torch: bool | None = None,
    ) -> None:
        self._merged, self._hidden = merged, len(weight)
        self._rounded = precision == "bfloat16"
        self._torch = _torch_can(precision) if use_torch is None else use_torch
        self._bias = None
        if self._torch:
            self._product = _torch_product(weight, bias, "bfloat16" if self._rounded else "float32")
        else:
            exact = weight.astype(ml_dtypes.bfloat16) if self._rounded else weight
            self._weight = np.ascontiguousarray(exact.astype(np.float32).T)
            self._bias = None if bias is None else bias.astype(np.float32)

    def __call__(self, patches: Array, order: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Embeddings of patches.

        Args:
            patches: float32, float16 or bfloat16 [P, patch_width], numpy or torch, on any device.
            order: int64 [N]; the token that goes to each place. None for the order in which they come.

        Returns:
            float32 [N, merged, hidden], C-contiguous.
        """
        rows = as_numpy(patches)
        if order is not None:
            # The patches are reordered rather than their embeddings: they are the narrower rows.
            rows = np.take(rows.reshape(len(order), -1), order, axis=0).reshape(rows.shape)
        if self._torch:
            embedded = as_numpy(self._product(as_host_tensor(rows, "bfloat16" if self._rounded else "float32")))
        else:
            exact = rows.astype(ml_dtypes.bfloat16) if self._rounded else rows
            embedded = exact.astype(np.float32, copy=False) @ self._weight
            if self._bias is not None:
                embedded += self._bias
            if self._rounded:
                embedded = embedded.astype(ml_dtypes.bfloat16)
        return embedded.astype(np.float32, copy=False).reshape(-1, self._merged, self._hidden)


class HostEmbedding:
    """All that a split program leaves to the host before it: embedding, norms and learned positions.

    Args:
        spec: The tower.
        weights: Its weights; those of `spec.embed_weights` are read.
        precision: What the program behind it computes in.

    Raises:
        CheckpointError: If a weight is missing or cannot be read.
    """

    def __init__(self, spec: TowerSpec, weights: Mapping[str, StoredTensor], precision: Precision) -> None:
        self._spec = spec
        if missing := [name for name in spec.embed_weights if name not in weights]:
            raise CheckpointError(
                f"the program leaves the patch embedding to the host, and its weight {missing[0]!r} is missing.",
                hint="Export the bundle again from a complete checkpoint.",
            )
        self._read = {name: weights[name].read() for name in spec.embed_weights}
        first = spec.embed[0]
        assert isinstance(first, Linear), "TowerSpec checks it"
        kernel = self._read.pop(f"{first.name}.weight").reshape(spec.hidden, spec.patch_width)
        bias = self._read.pop(f"{first.name}.bias") if first.bias else None
        self._embed = PatchEmbedding(kernel, precision, spec.merged, bias=bias)
        self._read = {name: values.astype(np.float32) for name, values in self._read.items()}

    def __call__(self, patches: Array, tables: Tables) -> NDArray[np.float32]:
        """Embedded patches in the tables' order of tokens: float32 [N, merged, hidden]."""
        order = None if tables.windows is None else tables.windows.index
        rows: NDArray[np.float32] = self._embed(patches, order)
        for step in self._spec.embed[1:]:
            assert isinstance(step, Norm), "TowerSpec checks it"
            rows = self._normalised(step, rows)
        positions = self._spec.positions
        if positions is None or tables.position_index is None or tables.position_weight is None:
            return rows
        table = self._read[f"{positions.name}.weight"]
        added: NDArray[np.float32] = np.zeros((tables.position_index.shape[1], self._spec.hidden), np.float32)
        for index, weight in zip(tables.position_index, tables.position_weight, strict=True):
            added += table[index] * weight
        added = added.reshape(rows.shape)
        return rows + (added if order is None else added[order])

    def _normalised(self, norm: Norm, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if norm.kind == "layer":
            rows = rows - rows.mean(axis=-1, keepdims=True)
        rows = rows / np.sqrt(np.square(rows).mean(axis=-1, keepdims=True) + np.float32(norm.epsilon))
        rows *= self._read[f"{norm.name}.weight"]
        return rows + self._read[f"{norm.name}.bias"] if norm.kind == "layer" else rows


def _torch_can(precision: Precision) -> bool:
    """Whether torch is installed and, for bfloat16, this processor has the instructions that it needs."""
    return find_spec("torch") is not None and (precision != "bfloat16" or has_bfloat16())


def _torch_product(weight: NDArray[Any], bias: NDArray[Any] | None, dtype: str) -> Any:
    """A function from [P, patch_width] to [P, hidden], both tensors of `dtype`."""
    import torch

    from visionaccel.core.packed_products import PackedWeight, why_not_packed

    matrix = as_host_tensor(np.ascontiguousarray(weight), dtype)
    term = None if bias is None else as_host_tensor(np.ascontiguousarray(bias), dtype)
    # Packed products are free of MKL, which on some processors takes twice as long.
    packed = PackedWeight(matrix, term) if why_not_packed(matrix.dtype) is None else None

    def product(x: Any) -> Any:
        with torch.inference_mode():
            return torch.nn.functional.linear(x, matrix, term) if packed is None else packed.unary(x)

    return product
