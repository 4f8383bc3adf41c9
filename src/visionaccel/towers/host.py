"""What the host does around a program of a tower: tables, and for a split program the embedding and the reorder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import Array, as_host_tensor, as_numpy, is_tensor
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.grid import Grid
from visionaccel.core.program import (
    CHECKPOINT,
    EMBEDDINGS,
    GRIDS,
    PATCH_EMBEDDINGS,
    PIXELS,
    WINDOW_EMBEDDINGS,
    Bucket,
    FixedGrid,
    Precision,
    Program,
)
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import Linear, Norm, TowerSpec
from visionaccel.errors import CheckpointError
from visionaccel.towers.tables import Tables, make_tables

RASTER, GROUPED = "raster", "grouped"
"""A tower's orders of tokens at the edges of a split program: windows row by row from the top, as in the reference, or
the same with windows of one size together, largest first. Without windows, `raster` is the order of the input."""

MASKED = np.float32(-3e4)
"""What hides a padded key in a score: it vanishes in the softmax, and float16 can hold it."""


class Host(ABC):
    """The host's part of one program: patches become its inputs, and its outputs become embeddings."""

    @abstractmethod
    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        """The named inputs of one call.

        Args:
            patches: [P, patch_width], checked against the grids: of the dtype of the program's own patches input, or
                of any dtype that `Encoder.encode` takes where the host embeds them.
            grids: The grids of the call; what the program covers decides how many.
        """

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:  # noqa: ARG002
        """float32 [tokens, out_width] in the order of the input tokens, from the checked outputs of that call."""
        return outputs[EMBEDDINGS]


def open_host(spec: TowerSpec, program: Program, weights: Mapping[str, StoredTensor]) -> Host:
    """The host's part of a program.

    Args:
        spec: The tower.
        program: One of its programs.
        weights: Its weights, of which a split program needs those that embed patches.

    Raises:
        CheckpointError: If a weight that the host needs is missing or cannot be read.
    """
    if program.format == CHECKPOINT:
        return _Plain()
    embedding = None if program.host is None else HostEmbedding(spec, weights, program.precision)
    match program.coverage:
        case FixedGrid():
            return _Fixed(spec, program, program.coverage, embedding)
        case Bucket():
            return _Padded(spec, program.coverage, embedding)
        case _:
            return _Dynamic(spec)


class _Plain(Host):
    """A program that makes its own tables."""

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        return {PIXELS: patches, GRIDS: np.array([grid.thw for grid in grids], dtype=np.int64)}


class _Dynamic(Host):
    """A program whose tables are inputs of any size."""

    def __init__(self, spec: TowerSpec) -> None:
        self._spec = spec

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        tables = make_tables(self._spec, grids)
        return {PIXELS: patches, **tables.fed(), "frames": np.array([len(tables.frame_lengths)], dtype=np.int64)}


class _Fixed(Host):
    """A program with the tables of one grid baked in."""

    def __init__(self, spec: TowerSpec, program: Program, coverage: FixedGrid, embedding: HostEmbedding | None) -> None:
        grouped = program.host is not None and program.host.order == GROUPED
        self._embedding = embedding
        self._tables = make_tables(spec, [coverage.grid], grouped=grouped)

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:  # noqa: ARG002
        if self._embedding is None:
            return {PIXELS: patches}
        return {PATCH_EMBEDDINGS: self._embedding(patches, self._tables)}

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:  # noqa: ARG002
        if self._embedding is None:
            return outputs[EMBEDDINGS]
        return _put_back(outputs[WINDOW_EMBEDDINGS], self._tables)


class _Padded(Host):
    """A program of fixed sizes whose tables are inputs: rows, windows and tables are padded, and padding is masked."""

    def __init__(self, spec: TowerSpec, bucket: Bucket, embedding: HostEmbedding | None) -> None:
        self._spec, self._bucket, self._embedding = spec, bucket, embedding
        # Images of one size follow each other in practice, and both calls of an encode need the tables.
        self._tables = lru_cache(maxsize=16)(self._make)

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        (frame,) = grids
        tables, padded = self._tables(frame.frame)
        if self._embedding is None:
            return {PIXELS: _pad(patches, self._bucket.patches), **padded}
        embedded = self._embedding(patches, tables)
        hosts = ("window_index", "reverse_index", "position_index", "position_weight")
        fed = {name: table for name, table in padded.items() if name not in hosts}
        return {PATCH_EMBEDDINGS: _pad(embedded, self._bucket.patches // self._spec.merged), **fed}

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:
        (frame,) = grids
        tokens = frame.frame.tokens(self._spec.merge)
        if self._embedding is None:
            return outputs[EMBEDDINGS][:tokens]
        return _put_back(outputs[WINDOW_EMBEDDINGS][:tokens], self._tables(frame.frame)[0])

    def _make(self, frame: Grid) -> tuple[Tables, Mapping[str, NDArray[Any]]]:
        tables, patches = make_tables(self._spec, [frame]), self._bucket.patches
        padded = tables.fed()
        real = np.arange(patches) < frame.patches
        for name in ("rotary_cos", "rotary_sin"):
            padded[name] = _pad(padded[name], patches)
        for name in {"position_index", "position_weight"} & padded.keys():
            padded[name] = np.ascontiguousarray(_pad(padded[name].swapaxes(0, 1), patches).swapaxes(0, 1))
        if tables.windows is not None:
            windows = self._bucket.sizes["windows"]
            spare = np.arange(len(tables.windows.index), patches // self._spec.merged)
            for name in ("window_index", "reverse_index"):
                padded[name] = np.concatenate([padded[name], spare])
            mask = _pad(padded.pop("window_mask"), windows).astype(bool)
            padded["window_patches"] = _pad(tables.windows.patches, windows)
            padded["window_slots"] = _pad(tables.windows.slots, patches)
            padded["window_bias"] = np.where(mask, np.float32(0), MASKED)[:, None, :]
        padded["frame_bias"] = np.where(real, np.float32(0), MASKED)
        return tables, padded


def _pad(array: Array, rows: int) -> Array:
    """`array` with zero rows appended, up to `rows`; a tensor stays one, on its device."""
    shape = (rows, *array.shape[1:])
    padded = array.new_zeros(shape) if is_tensor(array) else np.zeros(shape, dtype=array.dtype)
    padded[: len(array)] = array
    return padded


def _put_back(rows: Array, tables: Tables) -> Array:
    """Rows in the order of the input tokens."""
    if tables.windows is None:
        return rows
    order = tables.windows.reverse
    if is_tensor(rows):
        import torch

        return rows[torch.from_numpy(order).to(rows.device)]
    return rows[order]


class PatchEmbedding:
    """Embeds patches in a given order of tokens: a convolution whose stride is its kernel, hence a matrix product.

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

    Positions depend on a frame's height and width alone, so no table of them has to be in the program.

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
