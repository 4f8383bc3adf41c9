"""What the host does around a program of a tower: tables, and for a split program the embedding and the reorder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import Array, is_tensor
from visionaccel.core.grid import Grid
from visionaccel.core.program import CHECKPOINT, Bucket, FixedGrid, Program
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.core.tower_spec import TowerSpec
from visionaccel.towers.host_embedding import HostEmbedding
from visionaccel.towers.signature import EMBEDDINGS, GRIDS, PATCH_EMBEDDINGS, PIXELS, WINDOW_EMBEDDINGS
from visionaccel.towers.tables import Tables, make_tables

__all__ = ["GROUPED", "RASTER", "Host", "open_host"]

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

    @abstractmethod
    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:
        """float32 [tokens, out_width] in the order of the input tokens, from the checked outputs of that call."""


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

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:  # noqa: ARG002
        return outputs[EMBEDDINGS]


class _Dynamic(Host):
    """A program whose tables are inputs of any size."""

    def __init__(self, spec: TowerSpec) -> None:
        self._spec = spec

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        tables = make_tables(self._spec, grids)
        return {PIXELS: patches, **tables.fed(), "frames": np.array([len(tables.frame_lengths)], dtype=np.int64)}

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:  # noqa: ARG002
        return outputs[EMBEDDINGS]


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
