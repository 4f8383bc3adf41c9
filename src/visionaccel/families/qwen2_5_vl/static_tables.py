"""Where a graph of fixed shapes has its tables from, and how it cuts the rows into windows: baked in, or fed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import groupby

import numpy as np

from visionaccel.core.program import Bucket, FixedGrid, HostSplit
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.towers.onnx.writer import GraphWriter
from visionaccel.towers.tables import make_tables, window_order

__all__ = ["BakedTables", "FedTables", "StaticTables", "attend"]


class StaticTables(ABC):
    """The tables of a graph of fixed shapes, as values of that graph.

    Attributes:
        patches: Rows of the graph.
        cos: float32 [patches, head_dim], in window order.
        sin: float32 [patches, head_dim]; the first half negated, so that a rotation swaps halves and negates none.
        window_index: int64 [tokens]; where each token in window order stands in input order.
        reverse_index: int64 [tokens]; its inverse.
        regroup_index: int64 [tokens]; where each token of the graph's own order stands in the order at the edges of a
            split program, or None where these are the same.
        ungroup_index: int64 [tokens]; its inverse, or None.
        frame_bias: float32 [patches] that is added to the scores of full attention, or None.
    """

    patches: int
    cos: str
    sin: str
    window_index: str
    reverse_index: str
    regroup_index: str | None
    ungroup_index: str | None
    frame_bias: str | None

    @abstractmethod
    def within_windows(self, query: str, key: str, value: str) -> str:
        """Attention of every row to the rows of its window; [heads, patches, head_dim] each, as the result is."""


def attend(g: GraphWriter, query: str, key: str, value: str, *, axes: int, bias: str | None) -> str:
    """softmax(query key^T + bias) value over the last two of `axes` axes; the query comes scaled."""
    *leading, rows, width = range(axes)
    scores = g.widen(g.node("MatMul", [query, g.node("Transpose", [key], perm=[*leading, width, rows])]))
    if bias is not None:
        scores = g.node("Add", [scores, bias])
    return g.node("MatMul", [g.narrow(g.node("Softmax", [scores], axis=-1)), value])


class BakedTables(StaticTables):
    """The constant tables of one grid. Windows of one size stand together and are one batch, so none is masked.

    Args:
        config: Sizes of the tower.
        g: The graph.
        coverage: The grid.
        host: What is left to the host. The graph's own order is `grouped`; that at its edges may be another.
    """

    def __init__(self, config: VisionConfig, g: GraphWriter, coverage: FixedGrid, host: HostSplit | None) -> None:
        tables = make_tables(config, [coverage.grid], grouped=True)
        self._config, self._g = config, g
        self._groups = [(size, len(list(same))) for size, same in groupby(tables.window_lengths.tolist())]
        self.patches = coverage.grid.patches
        self.cos = g.constant(np.concatenate([tables.rotary_cos, tables.rotary_cos], axis=1))
        self.sin = g.constant(np.concatenate([-tables.rotary_sin, tables.rotary_sin], axis=1))
        self.window_index = g.constant(tables.window_index)
        self.reverse_index = g.constant(tables.reverse_index)
        self.regroup_index = self.ungroup_index = None
        if host is not None and host.window_order == "raster":
            raster, _ = window_order(config, [coverage.grid])
            if not np.array_equal(raster, tables.window_index):
                self.regroup_index = g.constant(np.argsort(raster)[tables.window_index])
                self.ungroup_index = g.constant(tables.reverse_index[raster])
        self.frame_bias = None

    def within_windows(self, query: str, key: str, value: str) -> str:
        g, heads, width = self._g, self._config.num_heads, self._config.head_dim
        if len(self._groups) == 1:
            parts = [[query], [key], [value]]
        else:
            rows = g.constant([size * windows for size, windows in self._groups])
            wanted = [True] * len(self._groups)
            parts = [g.nodes("Split", [x, rows], wanted, axis=1) for x in (query, key, value)]
        found = []
        for (size, windows), *run in zip(self._groups, *parts, strict=True):
            batch = [g.node("Reshape", [x, g.constant([heads, windows, size, width])]) for x in run]
            out = attend(g, *batch, axes=4, bias=None)
            found.append(g.node("Reshape", [out, g.constant([heads, windows * size, width])]))
        return found[0] if len(found) == 1 else g.node("Concat", found, axis=1)


class FedTables(StaticTables):
    """Tables that are inputs of the graph, padded to the sizes of a bucket; masks are terms added to the scores."""

    def __init__(self, config: VisionConfig, g: GraphWriter, coverage: Bucket) -> None:
        self._config, self._g, self._windows = config, g, coverage.windows
        self.patches = coverage.patches
        self.cos = g.node("Concat", ["rotary_cos", "rotary_cos"], axis=1)
        self.sin = g.node("Concat", [g.node("Neg", ["rotary_sin"]), "rotary_sin"], axis=1)
        self.window_index, self.reverse_index, self.frame_bias = "window_index", "reverse_index", "frame_bias"
        self.regroup_index = self.ungroup_index = None
        self._rows = g.node("Reshape", ["window_patches", g.constant([coverage.windows * config.window_patches])])

    def within_windows(self, query: str, key: str, value: str) -> str:
        g, config = self._g, self._config
        heads, size, width = config.num_heads, config.window_patches, config.head_dim
        shape = g.constant([heads, self._windows, size, width])
        gathered = [g.node("Gather", [x, self._rows], axis=1) for x in (query, key, value)]
        out = attend(g, *(g.node("Reshape", [x, shape]) for x in gathered), axes=4, bias="window_bias")
        out = g.node("Reshape", [out, g.constant([heads, self._windows * size, width])])
        return g.node("Gather", [out, "window_slots"], axis=1)
