"""What is found of the host's part in a graph that others exported, cut and compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.contracts import TensorSpec
from visionaccel.core.grid import Grid
from visionaccel.core.program import HostSplit

__all__ = ["HostPart", "OrderMatch", "UnrecognisedHost"]


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
