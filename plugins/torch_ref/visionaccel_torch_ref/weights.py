"""A tower's weights, read one by one from the shards of its checkpoint."""

import math
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

from visionaccel.errors import CheckpointError
from visionaccel.program import Program

__all__ = ["WeightReader"]


class WeightReader:
    """Reads weights by their names below the checkpoint's prefix; a context manager. It keeps none.

    Args:
        program: Where the weights lie.
        dtype: Their dtype once read.
        device: Where they are put.
    """

    def __init__(self, program: Program, dtype: torch.dtype, device: str) -> None:
        self._program, self._dtype, self._device = program, dtype, device
        self._left = set(program.weights)
        self._shards: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

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
        file = str(stored.file)
        if file not in self._shards:
            opened = safe_open(file, framework="pt", device=self._device)
            self._shards[file] = self._stack.enter_context(opened)
        self._left.discard(name)
        tensor: torch.Tensor = self._shards[file].get_tensor(stored.name)
        return tensor.to(self._dtype).view(wanted)

    def unfit(self, what: str) -> CheckpointError:
        """The error for weights that are not those of the configuration."""
        return CheckpointError(
            f"{self._program.folder}: the vision weights do not fit the configuration: {what}.",
            hint="Configuration and weights are of different models.",
        )
