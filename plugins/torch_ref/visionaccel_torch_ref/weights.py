"""A tower's weights, read one by one from the shards of its checkpoint."""

import math
from collections.abc import Sequence

import torch

from visionaccel.core.arrays import as_host_tensor
from visionaccel.core.program import Program
from visionaccel.errors import CheckpointError

__all__ = ["WeightReader"]


class WeightReader:
    """Reads weights by their names below the checkpoint's prefix. It keeps none.

    Args:
        program: Where the weights lie.
        dtype: Their dtype once read.
        device: Where they are put.
    """

    def __init__(self, program: Program, dtype: torch.dtype, device: str) -> None:
        self._program, self._dtype, self._device = program, dtype, device
        self._left = set(program.weights)

    @property
    def left(self) -> frozenset[str]:
        """Names that were not read yet."""
        return frozenset(self._left)

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A weight by its name.

        Args:
            name: Its name below the prefix.
            shape: What it is viewed as, the first size being its own; None for its own shape.

        Raises:
            CheckpointError: If there is none of that name, or it has another size.
        """
        stored = self._program.weights.get(name)
        if stored is None:
            raise self.unfit(f"{name!r} is missing")
        wanted = stored.shape if shape is None else shape
        if stored.shape[:1] != wanted[:1] or math.prod(stored.shape) != math.prod(wanted):
            raise self.unfit(f"{name!r} is {list(stored.shape)} and not {list(wanted)}")
        self._left.discard(name)
        tensor: torch.Tensor = as_host_tensor(stored.read(), stored.dtype)
        return tensor.to(self._device, self._dtype).view(wanted)

    def read_joint(self, name: str, parts: Sequence[str], shape: tuple[int, ...]) -> torch.Tensor:
        """A weight that may also be stored as several parts, whose rows follow each other in it.

        Args:
            name: Its name below the prefix.
            parts: The names of its parts, of equal sizes.
            shape: Its shape.

        Raises:
            CheckpointError: As `read`.
        """
        if not set(parts) <= set(self._program.weights):
            return self.read(name, shape)
        part_shape = (shape[0] // len(parts), *shape[1:])
        return torch.cat([self.read(part, part_shape) for part in parts])

    def unfit(self, what: str) -> CheckpointError:
        """The error for weights that are not those of the configuration."""
        return CheckpointError(
            f"{self._program.folder}: the vision weights do not fit the configuration: {what}.",
            hint="Configuration and weights are of different models.",
        )
