"""What a family of vision towers knows: its geometry, its programs, and how patches become a program's inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from visionaccel.arrays import Array
from visionaccel.checkpoint import Checkpoint
from visionaccel.grid import Grid
from visionaccel.program import Program

__all__ = ["Family", "Tower"]


class Tower(ABC):
    """The vision tower of one checkpoint: sizes, programs and host-side tables. Holds no weights.

    Attributes:
        family: The family's name.
        patch_width: Width of a row of patches: channels * temporal patch size * patch size**2.
        merge_size: Patches merged into one token along each side.
        out_width: Width of an embedding.
        checkpoint: Where its weights lie.
    """

    family: str
    patch_width: int
    merge_size: int
    out_width: int
    checkpoint: Checkpoint

    @abstractmethod
    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        """The programs this tower can give in the wanted formats, cheaply: nothing is written or read yet."""

    @abstractmethod
    def onnx_model(self, folder: Path | None = None) -> bytes:
        """The tower as an ONNX model for every grid, its weights referenced in the checkpoint's own shards.

        Args:
            folder: External-data locations are relative to it; it must hold all shards, at any depth. Default: the
                deepest such folder.

        Raises:
            CheckpointError: If a weight is missing or does not fit the configuration.
        """

    @abstractmethod
    def inputs(self, program: Program, patches: Array, grids: Sequence[Grid]) -> Mapping[str, Array]:
        """The named inputs of one call.

        Args:
            program: One of `programs()`.
            patches: float32 [P, patch_width], checked against the grids.
            grids: The grids of the call; of one frame size if the program demands it.
        """


class Family(ABC):
    """A kind of vision tower, found by the architecture that a checkpoint's configuration names."""

    name: ClassVar[str]
    architectures: ClassVar[frozenset[str]]

    @abstractmethod
    def tower(self, checkpoint: Checkpoint) -> Tower:
        """The tower of a checkpoint.

        Raises:
            CheckpointError: If the configuration is incomplete or the weights do not fit it.
            UnsupportedArchitectureError: If the configuration asks for something that is not implemented.
        """
