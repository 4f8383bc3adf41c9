"""Qwen2.5-VL's vision tower: window attention, axial rotary positions, 2x2 patch merging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.program import (
    CHECKPOINT,
    ONNX,
    ONNX_STANDARD,
    AnyGrid,
    Bucket,
    Coverage,
    FixedGrid,
    HostSplit,
    OperatorDialect,
    Precision,
    Program,
)
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import CheckpointError, ConfigurationError
from visionaccel.families.base import (
    Family,
    Host,
    HostPart,
    Operations,
    OperatorGraph,
    Tower,
    UnrecognisedHost,
    WindowMatch,
)
from visionaccel.families.qwen2_5_vl.config import DEFAULTS, VisionConfig
from visionaccel.families.qwen2_5_vl.weight_names import by_own_names, has_every_weight, weight_names
from visionaccel.towers.host import open_host
from visionaccel.towers.operations import count_operations
from visionaccel.towers.recognition import match_windows, recognise_host
from visionaccel.towers.signature import EMBEDDINGS, PATCH_KERNEL, Signature, signature
from visionaccel.towers.stored_form import plain_weights
from visionaccel.towers.tables import tower_tables

__all__ = ["WEIGHT_PREFIXES", "Qwen25VL", "Qwen25VLTower"]

WEIGHT_PREFIXES = ("model.visual.", "visual.")
"""What the tower's tensor names start with: since transformers 4.52, and before."""


class Qwen25VL(Family):
    """Checkpoints of `Qwen2_5_VLForConditionalGeneration`."""

    name = "qwen2_5_vl"
    architectures = frozenset({"Qwen2_5_VLForConditionalGeneration"})

    def tower(self, checkpoint: Checkpoint) -> Qwen25VLTower:
        return Qwen25VLTower(checkpoint)


class Qwen25VLTower(Tower):
    """The vision tower of one checkpoint."""

    family = Qwen25VL.name
    host_weights = (PATCH_KERNEL,)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = VisionConfig.of(checkpoint)
        self.patch_size = self.config.patch_size
        self.patch_width = self.config.patch_width
        self.merge_size = self.config.spatial_merge_size
        self.out_width = self.config.out_hidden_size

    @property
    def sizes(self) -> VisionConfig:
        return self.config

    @property
    def stored_names(self) -> frozenset[str]:
        return frozenset(name for name in self.checkpoint.tensors if name.startswith(WEIGHT_PREFIXES))

    @cached_property
    def weights(self) -> Mapping[str, StoredTensor]:
        found = self.checkpoint.with_prefix(WEIGHT_PREFIXES)
        if not found:
            raise CheckpointError(
                f"{self.checkpoint.folder} holds no vision weights (no tensor starts with "
                f"{' or '.join(map(repr, WEIGHT_PREFIXES))}).",
                hint="The checkpoint was stripped; set VISIONACCEL_BUNDLE to a folder that has the vision weights.",
            )
        return plain_weights(by_own_names(found), frozenset(weight_names(self.config)))

    def over(self, weights: Mapping[str, StoredTensor]) -> Self:
        other = copy(self)
        other.weights = weights
        return other

    @property
    def complete(self) -> bool:
        return bool(self.stored_names) and has_every_weight(self.config, self.weights)

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        known: dict[str, Callable[[], Program]] = {
            ONNX: partial(self._onnx_program, ONNX, "microsoft"),
            ONNX_STANDARD: partial(self._onnx_program, ONNX_STANDARD, "standard"),
            CHECKPOINT: self._checkpoint_program,
        }
        return tuple(known[wanted]() for wanted in sorted(set(formats)) if wanted in known)

    def signature(self, coverage: Coverage, host: HostSplit | None) -> Signature:
        return signature(self.config, coverage, host)

    def split(self, coverage: Coverage) -> HostSplit:
        match coverage:
            case FixedGrid():
                return HostSplit("grouped")
            case Bucket():
                return HostSplit("raster")
            case _:
                raise ConfigurationError(
                    "a program for any grid leaves nothing but the tables to the host.",
                    hint="Split programs of fixed shapes only.",
                )

    def takes_split(self, coverage: Coverage, split: HostSplit) -> bool:
        match coverage:
            case FixedGrid():
                return True
            case Bucket():
                return split == self.split(coverage)
            case AnyGrid():
                return False

    def bucket(self, largest: Grid) -> Bucket:
        return Bucket(largest.frame.patches, self._windows(largest.frame))

    def fits(self, coverage: Coverage, frame: Grid) -> bool:
        match coverage:
            case FixedGrid():
                return coverage.grid == frame
            case Bucket():
                return frame.patches <= coverage.patches and self._windows(frame) <= coverage.windows
            case AnyGrid():
                return coverage.most_patches is None or frame.patches <= coverage.most_patches

    def host(self, program: Program) -> Host:
        return open_host(self.config, program, self.weights.get(PATCH_KERNEL) if program.host else None)

    def operations(self, grids: Sequence[Grid]) -> Operations:
        return count_operations(self.config, grids)

    def recognise_host(self, graph: OperatorGraph, boundary: tuple[str, str] | None) -> HostPart | UnrecognisedHost:
        return recognise_host(self.config, graph, boundary)

    def match_windows(self, window_index: NDArray[np.int64]) -> WindowMatch:
        return match_windows(self.config, window_index)

    def onnx_model(
        self,
        folder: Path | None = None,
        *,
        coverage: Coverage = AnyGrid(),  # noqa: B008 - frozen and without state
        precision: Precision = "float32",
        host: HostSplit | None = None,
        dialect: OperatorDialect | None = None,
    ) -> bytes:
        # onnx takes a noticeable time to import and only a backend that opens this program needs it.
        from visionaccel.towers.onnx.bound import write_bound_graph
        from visionaccel.towers.onnx.fixed import write_static_graph
        from visionaccel.towers.onnx.graph import write_graph
        from visionaccel.towers.onnx.writer import GraphWriter

        writer = GraphWriter(folder or self.weights_folder, precision)
        if isinstance(coverage, AnyGrid):
            if host is not None:
                self.split(coverage)
            model = write_graph(self.config, self.weights, writer, dialect or "microsoft")
        elif dialect == "microsoft":
            if host is not None:
                raise ConfigurationError(
                    "a program in ONNX Runtime's operators leaves nothing but the tables to the host.",
                    hint="Split programs in standard operators only.",
                )
            model = write_bound_graph(self.config, self.weights, writer, coverage)
        else:
            model = write_static_graph(self.config, self.weights, writer, coverage, host)
        return bytes(model.SerializeToString())

    def _windows(self, frame: Grid) -> int:
        side = self.config.window_tokens * self.merge_size
        return -(-frame.h // side) * -(-frame.w // side)

    def _onnx_program(self, stored_as: str, dialect: OperatorDialect) -> Program:
        inputs, outputs = self.signature(AnyGrid(), None)
        return Program(
            name="dynamic",
            family=self.family,
            format=stored_as,
            folder=self.weights_folder,
            inputs=inputs,
            outputs=outputs,
            config=self.checkpoint.config["vision_config"],
            weights=self.weights,
            uniform_frames=True,
            model=partial(self.onnx_model, dialect=dialect),
        )

    def _checkpoint_program(self) -> Program:
        return Program(
            name="checkpoint",
            family=self.family,
            format=CHECKPOINT,
            folder=self.checkpoint.folder,
            inputs=(
                TensorSpec("pixel_values", "float32", ("patches", self.patch_width)),
                TensorSpec("grid_thw", "int64", ("images", 3)),
            ),
            outputs=(TensorSpec(EMBEDDINGS, "float32", ("tokens", self.out_width)),),
            config={**DEFAULTS, **self.checkpoint.config["vision_config"]},
            weights=self.weights,
            uniform_frames=False,
            tables=partial(tower_tables, self.config),
        )
