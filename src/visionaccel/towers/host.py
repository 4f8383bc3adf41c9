"""What the host does around a program of the tower: tables, and for a split program the embedding and the reorder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import FLOATS, Array, is_tensor
from visionaccel.core.grid import Grid
from visionaccel.core.program import CHECKPOINT, Bucket, FixedGrid, Program
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import CheckpointError
from visionaccel.families.base import Host
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.towers.patch_embedding import PatchEmbedding
from visionaccel.towers.signature import EMBEDDINGS, PATCH_EMBEDDINGS, PIXELS, WINDOW_EMBEDDINGS
from visionaccel.towers.tables import Tables, make_tables

__all__ = ["open_host", "read_matrix"]

MASKED = np.float32(-3e4)
"""What hides a padded key in a score: it vanishes in the softmax, and float16 can hold it."""


def open_host(config: VisionConfig, program: Program, kernel: StoredTensor | None) -> Host:
    """The host's part of a program.

    Args:
        config: Sizes of the tower.
        program: One of its programs.
        kernel: The patch embedding's weight, needed by a split program.

    Raises:
        CheckpointError: If the weight is missing or cannot be read.
    """
    if program.format == CHECKPOINT:
        return _Plain()
    embedding = None
    if program.host is not None:
        if kernel is None:
            raise CheckpointError(
                f"program {program.name!r} leaves the patch embedding to the host, and its weight is missing.",
                hint="Export the bundle again from a complete checkpoint.",
            )
        matrix = read_matrix(kernel, (config.hidden_size, config.patch_width))
        embedding = PatchEmbedding(matrix, program.precision, config.merged_patches)
    match program.coverage:
        case FixedGrid():
            return _Fixed(config, program, program.coverage, embedding)
        case Bucket():
            return _Padded(config, program.coverage, embedding)
        case _:
            return _Dynamic(config)


def read_matrix(stored: StoredTensor, shape: tuple[int, int]) -> NDArray[Any]:
    """A stored weight as a matrix in its own dtype.

    Raises:
        CheckpointError: If its size or dtype does not fit, or the file cannot be read.
    """
    if stored.dtype not in FLOATS or np.prod(stored.shape, dtype=np.int64) != shape[0] * shape[1]:
        raise CheckpointError(
            f"{stored.file}: {stored.name!r} is {stored.dtype}{list(stored.shape)}, which is no {list(shape)} matrix.",
            hint="Configuration and weights are of different models.",
        )
    return stored.read().reshape(shape)


class _Plain(Host):
    """A program that makes its own tables."""

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        return {PIXELS: patches, "grid_thw": np.array([grid.thw for grid in grids], dtype=np.int64)}

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:  # noqa: ARG002
        return outputs[EMBEDDINGS]


class _Dynamic(Host):
    """A program whose tables are inputs of any size."""

    def __init__(self, config: VisionConfig) -> None:
        self._config = config

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        tables = make_tables(self._config, grids)
        return {
            PIXELS: patches,
            "window_index": tables.window_index,
            "reverse_index": tables.reverse_index,
            "window_patches": tables.window_patches,
            "window_mask": tables.window_mask,
            "window_slots": tables.window_slots,
            "rotary_cos": tables.rotary_cos,
            "rotary_sin": tables.rotary_sin,
            "frames": np.array([len(tables.frame_lengths)], dtype=np.int64),
        }

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:  # noqa: ARG002
        return outputs[EMBEDDINGS]


class _Fixed(Host):
    """A program with the tables of one grid baked in."""

    def __init__(
        self, config: VisionConfig, program: Program, coverage: FixedGrid, embedding: PatchEmbedding | None
    ) -> None:
        grouped = program.host is not None and program.host.window_order == "grouped"
        self._embedding = embedding
        self._tables = make_tables(config, [coverage.grid], grouped=grouped)

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:  # noqa: ARG002
        if self._embedding is None:
            return {PIXELS: patches}
        return {PATCH_EMBEDDINGS: self._embedding(patches, self._tables.window_index)}

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:  # noqa: ARG002
        if self._embedding is None:
            return outputs[EMBEDDINGS]
        return _take(outputs[WINDOW_EMBEDDINGS], self._tables.reverse_index)


class _Padded(Host):
    """A program of fixed sizes whose tables are inputs: rows, windows and tables are padded, and padding is masked."""

    def __init__(self, config: VisionConfig, bucket: Bucket, embedding: PatchEmbedding | None) -> None:
        self._config, self._bucket, self._embedding = config, bucket, embedding
        # Images of one size follow each other in practice, and both calls of an encode need the tables.
        self._tables = lru_cache(maxsize=16)(self._make)

    def inputs(self, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        (frame,) = grids
        tables, padded = self._tables(frame.frame)
        if self._embedding is None:
            rows = _pad(patches, self._bucket.patches)
            return {PIXELS: rows, **padded}
        embedded = self._embedding(patches, tables.window_index)
        fed = {name: table for name, table in padded.items() if name not in ("window_index", "reverse_index")}
        return {PATCH_EMBEDDINGS: _pad(embedded, self._bucket.patches // self._config.merged_patches), **fed}

    def embeddings(self, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:
        (frame,) = grids
        if self._embedding is None:
            return outputs[EMBEDDINGS][: frame.frame.tokens(self._config.spatial_merge_size)]
        tables, _ = self._tables(frame.frame)
        return _take(outputs[WINDOW_EMBEDDINGS], tables.reverse_index)

    def _make(self, frame: Grid) -> tuple[Tables, Mapping[str, NDArray[Any]]]:
        tables = make_tables(self._config, [frame])
        patches, windows = self._bucket.patches, self._bucket.windows
        tokens = patches // self._config.merged_patches
        real = np.arange(patches) < frame.patches
        spare = np.arange(len(tables.window_index), tokens)
        mask = _pad(tables.window_mask, windows).astype(bool)
        padded = {
            "window_index": np.concatenate([tables.window_index, spare]),
            "reverse_index": np.concatenate([tables.reverse_index, spare]),
            "window_patches": _pad(tables.window_patches, windows),
            "window_slots": _pad(tables.window_slots, patches),
            "rotary_cos": _pad(tables.rotary_cos, patches),
            "rotary_sin": _pad(tables.rotary_sin, patches),
            "window_bias": np.where(mask, np.float32(0), MASKED)[:, None, :],
            "frame_bias": np.where(real, np.float32(0), MASKED),
        }
        return tables, padded


def _pad(array: Array, rows: int) -> NDArray[Any]:
    """`array` with zero rows appended, up to `rows`."""
    padded = np.zeros((rows, *array.shape[1:]), dtype=array.dtype)
    padded[: len(array)] = array
    return padded


def _take(rows: Array, order: NDArray[np.int64]) -> Array:
    if is_tensor(rows):
        import torch

        return rows[torch.from_numpy(order).to(rows.device)]
    return rows[order]
