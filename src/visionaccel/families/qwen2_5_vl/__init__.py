"""Qwen2.5-VL's vision tower: window attention, axial rotary positions, 2x2 patch merging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from visionaccel.arrays import Array
from visionaccel.checkpoint import Checkpoint, StoredTensor
from visionaccel.contracts import TensorSpec
from visionaccel.errors import CheckpointError
from visionaccel.families.base import Family, Tower
from visionaccel.families.qwen2_5_vl.config import VisionConfig
from visionaccel.families.qwen2_5_vl.geometry import make_tables
from visionaccel.families.qwen2_5_vl.signature import EMBEDDINGS, graph_inputs, graph_outputs
from visionaccel.grid import Grid
from visionaccel.program import CHECKPOINT, ONNX, Program

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

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = VisionConfig.of(checkpoint)
        self.patch_width = self.config.patch_width
        self.merge_size = self.config.spatial_merge_size
        self.out_width = self.config.out_hidden_size

    @property
    def weights(self) -> Mapping[str, StoredTensor]:
        """The tower's tensors by their names below the prefix.

        Raises:
            CheckpointError: If the checkpoint holds none.
        """
        found = self.checkpoint.with_prefix(WEIGHT_PREFIXES)
        if not found:
            raise CheckpointError(
                f"{self.checkpoint.folder} holds no vision weights (no tensor starts with "
                f"{' or '.join(map(repr, WEIGHT_PREFIXES))}).",
                hint="The checkpoint was stripped; set VISIONACCEL_BUNDLE to a folder that has the vision weights.",
            )
        return found

    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        known = {ONNX: self._onnx_program, CHECKPOINT: self._checkpoint_program}
        return tuple(known[wanted]() for wanted in sorted(set(formats)) if wanted in known)

    def inputs(self, program: Program, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        if program.format == CHECKPOINT:
            return {"pixel_values": patches, "grid_thw": np.array([(g.t, g.h, g.w) for g in grids], dtype=np.int64)}
        tables = make_tables(self.config, grids)
        return {
            "pixel_values": patches,
            "window_index": tables.window_index,
            "reverse_index": tables.reverse_index,
            "window_patches": tables.window_patches,
            "window_mask": tables.window_mask,
            "window_slots": tables.window_slots,
            "rotary_cos": tables.rotary_cos,
            "rotary_sin": tables.rotary_sin,
            "frames": np.array([len(tables.frame_lengths)], dtype=np.int64),
        }

    def _onnx_program(self) -> Program:
        return Program(
            family=self.family,
            format=ONNX,
            folder=self.checkpoint.weights_folder,
            inputs=graph_inputs(self.config),
            outputs=graph_outputs(self.config),
            config=self.checkpoint.config["vision_config"],
            weights=self.weights,
            uniform_frames=True,
            model=self.onnx_model,
        )

    def onnx_model(self, folder: Path | None = None) -> bytes:
        # onnx takes a noticeable time to import and only a backend that opens this program needs it.
        from visionaccel.families.qwen2_5_vl.graph import write_graph
        from visionaccel.onnx_writer import GraphWriter

        writer = GraphWriter(folder or self.checkpoint.weights_folder)
        return bytes(write_graph(self.config, self.weights, writer).SerializeToString())

    def _checkpoint_program(self) -> Program:
        return Program(
            family=self.family,
            format=CHECKPOINT,
            folder=self.checkpoint.folder,
            inputs=(
                TensorSpec("pixel_values", "float32", ("patches", self.patch_width)),
                TensorSpec("grid_thw", "int64", ("images", 3)),
            ),
            outputs=(TensorSpec(EMBEDDINGS, "float32", ("tokens", self.out_width)),),
            config=self.checkpoint.config["vision_config"],
            weights=self.weights,
            uniform_frames=False,
        )
