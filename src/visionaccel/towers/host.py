"""The host's work around a program: it makes tables, and for a split program embeds patches and reorders tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import Array, as_host_tensor, as_numpy, is_tensor
from visionaccel.core.cpu import has_bfloat16
from visionaccel.core.dtypes import FLOATS
from visionaccel.core.grid import Grid
from visionaccel.core.program import (
    CHECKPOINT,
    EMBEDDINGS,
    GRIDS,
    PATCH_EMBEDDINGS,
    PIXELS,
    WINDOW_EMBEDDINGS,
    AnyGrid,
    Bucket,
    Precision,
    Program,
)
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import Linear, Norm, TowerSpec
from visionaccel.errors import CheckpointError
from visionaccel.towers.tables import make_tables

Tables: TypeAlias = Mapping[str, NDArray[Any]]

RASTER, GROUPED = "raster", "grouped"
"""Orders of tokens at the inputs and outputs of a split program: windows row by row from the top, as in the reference,
or windows of equal size together, largest first. Without windows, `raster` is the order of the input."""

MASKED = np.float32(-3e4)
"""Added to the score of a padded key: large enough to vanish in the softmax, and representable in float16."""


class Host:
    """The host's part of one program: turns patches into its inputs, and its outputs into embeddings.

    Args:
        spec: The tower.
        program: One of its programs.
        weights: The tower's weights, by the spec's names. Only those that embed patches are read, for a split program.

    Raises:
        CheckpointError: If a weight that the host needs is missing or cannot be read.
    """

    def __init__(self, spec: TowerSpec, program: Program, weights: Mapping[str, StoredTensor]) -> None:
        # Do not keep the program: it may hold a copy of the weights in memory, which nothing else should keep alive.
        self._spec, self._inputs = spec, tuple(tensor.name for tensor in program.inputs)
        self._makes_tables = program.format != CHECKPOINT
        self._bucket = program.coverage if isinstance(program.coverage, Bucket) else None
        self._grouped = program.host is not None and program.host.order == GROUPED
        self._embedding = None if program.host is None else HostEmbedding(spec, weights, program.precision)
        # Images of one size often follow each other, and `inputs` and `embeddings` both need the tables. Those of a
        # program for any grid may be large, and only `inputs` needs them.
        self._tables = lru_cache(maxsize=0 if isinstance(program.coverage, AnyGrid) else 16)(self._make_tables)

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        """Make the named inputs of one call.

        Args:
            patches: [P, patch_width], checked against the grids. They have the dtype of the program's patches input
                or, if the host embeds them, any dtype that `Encoder.encode` accepts. Read only.
            grids: The grids of the call.

        Returns:
            An array for each of the program's inputs, by name. Calls may share tables: do not write to them.
        """
        if not self._makes_tables:
            return {PIXELS: patches, GRIDS: np.array([grid.thw for grid in grids], dtype=np.int64)}
        tables, fed = self._tables(tuple(grids))
        name, rows, most = PIXELS, patches, self._bucket.patches if self._bucket else 0
        if self._embedding is not None:
            name, rows, most = PATCH_EMBEDDINGS, self._embedding(patches, tables), most // self._spec.merged
        found = {**fed, name: _pad(rows, most) if most else rows}
        return {name: found[name] for name in self._inputs}

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:
        """Return the embeddings of a call from its checked outputs: float32 [tokens, out_width] in input order."""
        tokens = sum(grid.tokens(self._spec.merge) for grid in grids)
        if self._embedding is None:
            return outputs[EMBEDDINGS][:tokens]
        rows = outputs[WINDOW_EMBEDDINGS][:tokens]
        if self._spec.window is None:
            return rows
        order = self._tables(tuple(grids))[0]["reverse_index"]
        if is_tensor(rows):
            import torch

            return rows[torch.from_numpy(order).to(rows.device)]
        return rows[order]

    def _make_tables(self, grids: tuple[Grid, ...]) -> tuple[Tables, Tables]:
        """Make the tables of a call, and the program's inputs from them, padded for a bucket."""
        tables = make_tables(self._spec, grids, grouped=self._grouped)
        if self._bucket is not None:
            return tables, self._padded(tables, self._bucket)
        return tables, {**tables, "frames": np.array([len(tables["frame_lengths"])], dtype=np.int64)}

    def _padded(self, tables: Tables, bucket: Bucket) -> Tables:
        """Pad tables to a bucket's fixed sizes; masks become terms that are added to the attention scores."""
        real, patches = len(tables["rotary_cos"]), bucket.patches
        padded = {name: _pad(tables[name], patches) for name in ("rotary_cos", "rotary_sin")}
        padded["frame_bias"] = np.where(np.arange(patches) < real, np.float32(0), MASKED)
        for name in {"position_index", "position_weight"} & tables.keys():
            padded[name] = np.ascontiguousarray(_pad(tables[name].swapaxes(0, 1), patches).swapaxes(0, 1))
        if self._spec.window is not None:
            windows, merged = bucket.sizes["windows"], self._spec.merged
            spare = np.arange(real // merged, patches // merged)
            for name in ("window_index", "reverse_index"):
                padded[name] = np.concatenate([tables[name], spare])
            padded["window_slots"] = _pad(tables["window_slots"], patches)
            padded["window_patches"] = _pad(tables["window_patches"], windows)
            mask = _pad(tables["window_mask"], windows)
            padded["window_bias"] = np.where(mask, np.float32(0), MASKED)[:, None, :]
        return padded


def _pad(array: Array, rows: int) -> Array:
    """Append zero rows to `array`, up to `rows`; a tensor stays a tensor, on its device."""
    shape = (rows, *array.shape[1:])
    padded = array.new_zeros(shape) if is_tensor(array) else np.zeros(shape, dtype=array.dtype)
    padded[: len(array)] = array
    return padded


class PatchEmbedding:
    """Embeds patches in a given order of tokens: a convolution whose stride equals its kernel, so a matrix product.

    With torch, oneDNN computes the product from a weight that is packed once; in bfloat16 it takes half the time of
    float32. Without torch, numpy computes it, always in float32.

    Args:
        weight: [hidden, patch_width], the kernel as a matrix.
        precision: The program's precision. With bfloat16, patches and result are rounded here too. With float16, the
            product is computed in float32, which is faster on CPUs.
        merged: Patches of one token, which stay together.
        bias: [hidden], added before the result is rounded; None for no bias.
        use_torch: Whether torch computes the product; None to use torch if it is installed and supports the precision.
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
        self._shape = -1, merged, len(weight)
        self._torch = _torch_can(precision) if use_torch is None else use_torch
        make_product = _torch_product if self._torch else _numpy_product
        self._product = make_product(weight, bias, "bfloat16" if precision == "bfloat16" else "float32")

    def __call__(self, patches: Array, order: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """Embed patches [P, patch_width] of any float dtype: float32 [N, merged, hidden], C-contiguous.

        `order` is int64 [N], the input token at each output place; None keeps the order of the input.
        """
        rows = as_numpy(patches)
        if order is not None:
            # Reorder the patches and not their embeddings, whose rows are wider.
            rows = np.take(rows.reshape(len(order), -1), order, axis=0).reshape(rows.shape)
        return self._product(rows).astype(np.float32, copy=False).reshape(self._shape)


class HostEmbedding:
    """What the host computes before a split program: patch embedding, norms and learned positions.

    Positions depend only on a frame's height and width, so the program needs no table of them.
    """

    def __init__(self, spec: TowerSpec, weights: Mapping[str, StoredTensor], precision: Precision) -> None:
        self._spec = spec
        if missing := [name for name in spec.embed_weights if name not in weights]:
            raise CheckpointError(
                f"weight {missing[0]!r}, which the host needs for the patch embedding, is missing.",
                hint="Export the bundle again from a complete checkpoint.",
            )
        read = {name: weights[name].read() for name in spec.embed_weights}
        first = spec.embed[0]
        assert isinstance(first, Linear), "TowerSpec checks it"
        kernel = read.pop(f"{first.name}.weight").reshape(spec.hidden, spec.patch_width)
        bias = read.pop(f"{first.name}.bias") if first.bias else None
        self._embed = PatchEmbedding(kernel, precision, spec.merged, bias=bias)
        self._weights = {name: values.astype(np.float32) for name, values in read.items()}

    def __call__(self, patches: Array, tables: Tables) -> NDArray[np.float32]:
        """Embed patches, in the tables' order of tokens: float32 [N, merged, hidden]."""
        order = tables.get("window_index")
        rows = self._embed(patches, order)
        for step in self._spec.embed[1:]:
            assert isinstance(step, Norm), "TowerSpec checks it"
            rows = self._normalised(step, rows)
        if self._spec.positions is None:
            return rows
        table = self._weights[f"{self._spec.positions.name}.weight"]
        added: NDArray[np.float32] = np.zeros((len(patches), self._spec.hidden), np.float32)
        for index, weight in zip(tables["position_index"], tables["position_weight"], strict=True):
            added += table[index] * weight
        added = added.reshape(rows.shape)
        return rows + (added if order is None else added[order])

    def _normalised(self, norm: Norm, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if norm.kind == "layer":
            rows = rows - rows.mean(axis=-1, keepdims=True)
        rows = rows / np.sqrt(np.square(rows).mean(axis=-1, keepdims=True) + np.float32(norm.epsilon))
        rows *= self._weights[f"{norm.name}.weight"]
        return rows + self._weights[f"{norm.name}.bias"] if norm.kind == "layer" else rows


def _torch_can(precision: Precision) -> bool:
    """Return whether torch is installed and, for bfloat16, this processor has bfloat16 instructions."""
    return find_spec("torch") is not None and (precision != "bfloat16" or has_bfloat16())


Product: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]
"""Maps [P, patch_width] to [P, hidden]."""


def _numpy_product(weight: NDArray[Any], bias: NDArray[Any] | None, dtype: str) -> Product:
    def rounded(values: NDArray[Any]) -> NDArray[np.float32]:
        return values.astype(FLOATS[dtype], copy=False).astype(np.float32, copy=False)

    matrix = np.ascontiguousarray(rounded(weight).T)

    def product(rows: NDArray[Any]) -> NDArray[Any]:
        embedded = rounded(rows) @ matrix
        if bias is not None:
            embedded += bias.astype(np.float32)
        return rounded(embedded)

    return product


def _torch_product(weight: NDArray[Any], bias: NDArray[Any] | None, dtype: str) -> Product:
    import torch

    from visionaccel.core.packed_products import PackedWeight, why_not_packed

    matrix = as_host_tensor(np.ascontiguousarray(weight), dtype)
    term = None if bias is None else as_host_tensor(np.ascontiguousarray(bias), dtype)
    # Packed products avoid MKL, which takes twice as long on some processors.
    packed = PackedWeight(matrix, term) if why_not_packed(matrix.dtype) is None else None

    def product(rows: NDArray[Any]) -> NDArray[Any]:
        x = as_host_tensor(rows, dtype)
        with torch.inference_mode():
            return as_numpy(torch.nn.functional.linear(x, matrix, term) if packed is None else packed.unary(x))

    return product
