"""What a family of vision towers knows: its geometry, its programs, and how patches become a program's inputs.

And how to know its own host part again in a graph that others exported, cut and compiled.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from visionaccel.checkpoint import Checkpoint
from visionaccel.core.arrays import Array
from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, Bucket, Coverage, HostSplit, OperatorDialect, Precision, Program
from visionaccel.core.stored_tensor import StoredTensor

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Family",
    "Host",
    "HostPart",
    "MatrixProduct",
    "OperatorGraph",
    "Operations",
    "Tower",
    "UnrecognisedHost",
    "WindowMatch",
]


class OperatorGraph(Protocol):
    """An ONNX graph as a recogniser looks at it. Nodes are in their order; a node is meant by its place."""

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """Its nodes."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What is fed; unknown sizes are names."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What comes out; unknown sizes are names."""

    def producer(self, tensor: str) -> int | None:
        """The node that makes a tensor; None for inputs, weights, and what is not there."""

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """The values of a tensor that depends on no input and is simply made; None for any other.

        Raises:
            BundleError: If its data are damaged, missing or elsewhere.
        """

    def ancestors(self, tensors: Iterable[str], cut: Iterable[str] = ()) -> frozenset[int]:
        """Nodes that tensors depend on, not looking behind those of `cut`."""

    def descendants(self, tensors: Iterable[str], cut: Iterable[str] = ()) -> frozenset[int]:
        """Nodes that depend on tensors, not looking behind those of `cut`."""


@dataclass(frozen=True)
class HostPart:
    """The host's part of a compiled program, as it was found around the device's.

    Attributes:
        weights: The host's weights by their names below the checkpoint's prefix, float32, float16 or bfloat16.
        window_index: int64 [tokens]; the token that goes to each place, a permutation.
        input: What the device takes, by its own name.
        output: What the device gives, by its own name.
    """

    weights: Mapping[str, NDArray[Any]]
    window_index: NDArray[np.int64]
    input: TensorSpec
    output: TensorSpec


@dataclass(frozen=True)
class UnrecognisedHost:
    """Why operators around a device's part are not the family's host part.

    Attributes:
        reason: What is different.
        operators: Type and name of the host's operators, as far as they are known.
    """

    reason: str
    operators: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class WindowMatch:
    """Which grids have an order of windows.

    Attributes:
        found: The grids that have exactly it, each with how the host is split then.
        nearest: The grid whose order is most like it; None if no grid has as many tokens.
        differing: Places in which that one differs.
    """

    found: tuple[tuple[Grid, HostSplit], ...]
    nearest: Grid | None
    differing: int


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """Products of one shape: [rows, inner] by [inner, columns].

    Attributes:
        rows: Patches or tokens.
        inner: Width of the input.
        columns: Width of the output.
        count: How many of them a call has.
    """

    rows: int
    inner: int
    columns: int
    count: int = 1

    @property
    def operations(self) -> int:
        """Floating-point operations of all of them."""
        return 2 * self.rows * self.inner * self.columns * self.count


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations of one call of a tower.

    Attributes:
        patch_embedding: Those of the patch embedding.
        linears: The products in the blocks.
        full_attention: Those of attention over whole frames.
        window_attention: Those of attention within windows.
        merger: The products that make tokens of patches.
    """

    patch_embedding: int
    linears: tuple[MatrixProduct, ...]
    full_attention: int
    window_attention: int
    merger: tuple[MatrixProduct, ...]

    @property
    def total(self) -> int:
        """All of them."""
        products = sum(product.operations for product in (*self.linears, *self.merger))
        return self.patch_embedding + products + self.full_attention + self.window_attention

    @property
    def full_attention_share(self) -> float:
        """What of them is attention over whole frames: the part that grows with the square of the patches."""
        return self.full_attention / self.total


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


class Tower(ABC):
    """The vision tower of one checkpoint: sizes, programs and host-side tables. Holds no weights.

    Frames of a video must be independent of each other in the tower, so that a program of one frame serves videos.

    Attributes:
        family: The family's name.
        patch_size: Side of a patch in pixels.
        patch_width: Width of a row of patches: channels * temporal patch size * patch size**2.
        merge_size: Patches merged into one token along each side.
        out_width: Width of an embedding.
        host_weights: Names of the weights that the host needs beside a split program.
        checkpoint: Where its weights lie.
    """

    family: str
    host_weights: tuple[str, ...]
    patch_size: int
    patch_width: int
    merge_size: int
    out_width: int
    checkpoint: Checkpoint

    @property
    @abstractmethod
    def sizes(self) -> Hashable:
        """What its programs depend on besides weights: equal for towers whose programs are the same."""

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, StoredTensor]:
        """The tower's tensors, plain floats, by their names below the checkpoint's prefix.

        Raises:
            CheckpointError: If the checkpoint holds none, or they are quantised, stored twice with different values, or
                among others that the tower has no place for.
        """

    @property
    @abstractmethod
    def stored_names(self) -> frozenset[str]:
        """Full names of all that the checkpoint stores for the tower, buffers and unknown tensors too.

        None if its vision weights were stripped.

        Raises:
            CheckpointError: If the checkpoint is damaged.
        """

    @property
    def weights_folder(self) -> Path:
        """The deepest folder that holds the weights' files: the base of external-data locations."""
        return Path(os.path.commonpath({tensor.file.parent for tensor in self.weights.values()}))

    @abstractmethod
    def over(self, weights: Mapping[str, StoredTensor]) -> Self:
        """The same tower with its weights in another place, from where everything reads them."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether every weight that the family needs is there; without, programs that bring none cannot run.

        Raises:
            CheckpointError: As `weights`, but not where there are none.
        """

    @abstractmethod
    def programs(self, formats: Iterable[str]) -> tuple[Program, ...]:
        """The programs this tower can give in the wanted formats, cheaply: nothing is written or read yet."""

    @abstractmethod
    def onnx_model(
        self,
        folder: Path | None = None,
        *,
        coverage: Coverage = AnyGrid(),  # noqa: B008 - frozen and without state
        precision: Precision = "float32",
        host: HostSplit | None = None,
        dialect: OperatorDialect | None = None,
    ) -> bytes:
        """The tower as an ONNX model, its weights referenced in the files where they lie.

        Args:
            folder: External-data locations are relative to it; it must hold all shards, at any depth. Default: the
                deepest such folder.
            coverage: Which grids it takes. `FixedGrid` and `Bucket` give fixed shapes in standard operators of opset
                17; `AnyGrid` gives ONNX Runtime's fused operators.
            precision: Dtype of weights and activations; inputs and outputs are float32.
            host: What is left to the host, with fixed shapes and in standard operators only.
            dialect: Whose operators; None for what its coverage says above. The standard's for `AnyGrid` are of opset
                23.

        Raises:
            CheckpointError: If a weight is missing or does not fit the configuration.
            ConfigurationError: If the combination is not one that the family writes.
        """

    @abstractmethod
    def signature(
        self, coverage: Coverage, host: HostSplit | None
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Inputs and outputs of the ONNX model of that coverage."""

    @abstractmethod
    def split(self, coverage: Coverage) -> HostSplit:
        """How this family leaves work to the host for a program of that coverage.

        Raises:
            ConfigurationError: If it does not split such programs.
        """

    @abstractmethod
    def takes_split(self, coverage: Coverage, split: HostSplit) -> bool:
        """Whether this family's host can stand around a program of that coverage that leaves it that part."""

    @abstractmethod
    def bucket(self, largest: Grid) -> Bucket:
        """The smallest bucket that takes every frame of at most that height and width."""

    @abstractmethod
    def fits(self, coverage: Coverage, frame: Grid) -> bool:
        """Whether a program of that coverage takes a frame; `frame` has one temporal step."""

    @abstractmethod
    def host(self, program: Program) -> Host:
        """The host's part of one of this family's programs.

        Raises:
            CheckpointError: If a weight that the host needs is missing or cannot be read.
        """

    def operations(self, grids: Sequence[Grid]) -> Operations | None:  # noqa: ARG002
        """Floating-point operations of one call; None if the family does not count them."""
        return None

    @abstractmethod
    def recognise_host(self, graph: OperatorGraph, boundary: tuple[str, str] | None) -> HostPart | UnrecognisedHost:
        """The host's part of a program of one grid that leaves the patch embedding and the reorders to the host.

        Args:
            graph: The whole tower.
            boundary: Names of what the device takes and gives; None to find them.

        Raises:
            BundleError: If it is the host's part of another tower, or a reorder is none or is not undone.
        """

    @abstractmethod
    def match_windows(self, window_index: NDArray[np.int64]) -> WindowMatch:
        """Grids of one frame whose tokens come in that order, in either order of windows.

        Args:
            window_index: int64 [tokens]; the token that goes to each place.
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
