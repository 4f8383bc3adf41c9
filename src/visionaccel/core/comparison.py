"""Compares embeddings with those of a reference, token by token, and deepstack levels by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from visionaccel.core.arrays import block_name, column_blocks, finite_rows

THRESHOLDS: Mapping[str, float] = MappingProxyType(
    {"float32": 0.9999, "float16": 0.999, "bfloat16": 0.99, "int8": 0.99}
)
"""The lowest cosine of a token that passes, by the precision or the quantization of its program.

A cosine does not depend on lengths. Lengths may differ by as much as the largest angle that passes moves the end of an
embedding: by sqrt(2 - 2 cosine) of the reference's length, which is 14 % in bfloat16.
"""

FLOAT32_ERROR = 5e-5
"""The largest `Comparison.relative_error` of a program in float32.

Cosines do not show whether GELU was computed exactly or by tanh: either in the place of the other is a relative error
of 1e-4 to 4e-4, a cosine of 0.99999994. Float32 kernels of different runtimes differ by 5e-7 to 4e-6.
"""

_WRONG = -1.0
"""Cosine of a token that has no direction, so that a device that returns zeros, or NaN, cannot pass."""


class Place(NamedTuple):
    """Where a row is compared.

    Attributes:
        encode: The number of its encode, in the order of `add`, from 0.
        token: The token's row in that encode, from 0.
        block: 0 for the embedding, or the number of the deepstack level.
    """

    encode: int
    token: int
    block: int = 0

    def __str__(self) -> str:
        return f"{self.token}{block_name(self.block)}"


class Comparison:
    """Compares the encodes of one program with the reference's, and counts rows that contain NaN or infinity.

    Args:
        width: Width of an embedding, and of each deepstack level next to it (`TowerSpec.out`). Each is judged by
            itself, so that a good embedding does not hide a bad level.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self.encodes = self.tokens = self.nonfinite_rows = 0
        self._cosines: list[NDArray[np.float64]] = []
        self._length_errors: list[NDArray[np.float64]] = []
        self._squares: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []

    def add(self, ours: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
        """Compare one encode, [tokens, out_width]. For the relative error, NaN and infinity make a block zeros."""
        assert ours.shape == reference.shape, "embeddings of one encode have one shape"
        tokens = len(reference)
        self.nonfinite_rows += int((~finite_rows(ours)).sum())
        ours, reference = column_blocks(ours, self._width), column_blocks(reference, self._width)
        self._cosines.append(token_cosines(ours, reference))
        self._length_errors.append(length_errors(ours, reference))
        exact, found = (_finite_only(rows).reshape(tokens, -1, self._width) for rows in (reference, ours))
        self._squares.append((np.square(found - exact).sum(axis=(0, 2)), np.square(exact).sum(axis=(0, 2))))
        self.encodes += 1
        self.tokens += tokens

    def add_missing(self, reference: NDArray[np.float32], nonfinite_rows: int = 0) -> None:
        """Count all tokens of an encode that failed or was discarded as wrong; `nonfinite_rows` were not finite."""
        self.add(np.zeros_like(reference), reference)
        self.nonfinite_rows += nonfinite_rows

    @property
    def cosines(self) -> NDArray[np.float64]:
        """float64 [tokens * blocks]: the cosine of every token and deepstack level, encode by encode."""
        return np.concatenate(self._cosines)

    @property
    def lowest(self) -> float:
        """The lowest cosine."""
        return float(self.cosines.min())

    def worst(self, count: int) -> list[tuple[int, float]]:
        """Return the `count` encodes with the lowest cosines, lowest first: the number and lowest cosine of each."""
        lowest = [float(cosines.min()) for cosines in self._cosines]
        return sorted(enumerate(lowest), key=lambda each: each[1])[:count]

    def tokens_below(self, threshold: float) -> int:
        """Count the tokens with a cosine below the threshold, their own or a deepstack level's."""
        return int((self.cosines.reshape(-1, self._blocks) < threshold).any(axis=1).sum())

    @property
    def lowest_at(self) -> Place:
        """Where the lowest cosine is; the first of equal ones."""
        return self._place(self.cosines.argmin())

    @property
    def worst_length(self) -> tuple[float, Place]:
        """The largest of `length_errors`, which cosines do not show, and where it is; the first of equal ones."""
        errors = np.concatenate(self._length_errors)
        return float(errors.max()), self._place(errors.argmax())

    @property
    def first_percentile(self) -> float:
        """The cosine that 99 % of the tokens and levels reach, interpolated."""
        return float(np.percentile(self.cosines, 1))

    @property
    def mean(self) -> float:
        """The mean cosine."""
        return float(self.cosines.mean())

    @property
    def relative_error(self) -> float:
        """Norm of the difference divided by that of the reference, over all tokens; 0 or 1 for a reference of zeros.

        The largest of the embeddings' and each deepstack level's.
        """
        if not self._squares:
            return 0.0
        error, size = np.sum(self._squares, axis=0)
        shares = np.divide(error, size, out=(error > 0).astype(np.float64), where=size > 0)
        return float(np.sqrt(shares.max()))

    @property
    def _blocks(self) -> int:
        return len(self.cosines) // self.tokens

    def _place(self, at: np.intp) -> Place:
        starts = np.cumsum([0, *map(len, self._cosines)])
        encode = int(np.searchsorted(starts, at, side="right")) - 1
        return Place(encode, *divmod(int(at - starts[encode]), self._blocks))


def token_cosines(ours: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each row of [tokens, width], float64 [tokens]; -1 if either row is zero or not finite."""
    found, exact = _finite_only(ours), _finite_only(reference)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
    products = np.einsum("ij,ij->i", found, exact)
    cosines = np.divide(products, norms, out=np.full(len(norms), _WRONG), where=norms > 0)
    return np.asarray(cosines.clip(-1.0, 1.0))


def length_errors(ours: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the relative error of each row's length, float64 [tokens]; 1 if either row is zero or not finite."""
    found, exact = (np.linalg.norm(_finite_only(rows), axis=1) for rows in (ours, reference))
    return np.asarray(np.abs(np.divide(found, exact, out=np.zeros(len(exact)), where=exact > 0) - 1))


def _finite_only(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the rows in float64, with zeros for those that contain NaN or infinity."""
    return np.where(finite_rows(rows)[:, None], rows, 0).astype(np.float64)
