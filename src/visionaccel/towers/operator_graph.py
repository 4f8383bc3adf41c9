"""What a tower sees of a graph that others exported, cut and compiled, and what it finds there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.program import HostSplit

if TYPE_CHECKING:
    import onnx

__all__ = ["HostPart", "OperatorGraph", "UnrecognisedHost", "OrderMatch"]


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
        order: int64 [tokens]; the token that goes to each place, a permutation.
        input: What the device takes, by its own name.
        output: What the device gives, by its own name.
    """

    weights: Mapping[str, NDArray[Any]]
    order: NDArray[np.int64]
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
class OrderMatch:
    """Which grids have an order of tokens.

    Attributes:
        found: The grids that have exactly it, each with how the host is split then.
        nearest: The grid whose order is most like it; None if no grid has as many tokens.
        differing: Places in which that one differs.
    """

    found: tuple[tuple[Grid, HostSplit], ...]
    nearest: Grid | None
    differing: int
