"""A tower's weights, read one by one from the shards of its checkpoint."""

import torch

from visionaccel.core.arrays import as_host_tensor
from visionaccel.core.program import Program
from visionaccel.core.tower_spec import APART, JOINT, Linear
from visionaccel.errors import CheckpointError


class WeightReader:
    """Reads weights by the names of the tower's description. It keeps none.

    Args:
        program: The program with the stored weights.
        dtype: The dtype to convert them to.
        device: The device to copy them to.
    """

    def __init__(self, program: Program, dtype: torch.dtype, device: str) -> None:
        self._program, self._dtype, self._device = program, dtype, device

    def read(self, name: str, view: tuple[int, ...] | None = None) -> torch.Tensor:
        """Return a weight by its name.

        Args:
            name: Its name in the tower's description.
            view: A different shape for the values, such as a matrix for a convolution's kernel.

        Raises:
            CheckpointError: If it is missing, or cannot be read.
        """
        stored = self._program.weights.get(name)
        if stored is None:
            raise self.unfit(f"{name!r} is missing")
        tensor: torch.Tensor = as_host_tensor(stored.read(), stored.dtype)
        return tensor.to(self._device, self._dtype).view(view or stored.shape)

    def read_linear(self, linear: Linear, place: str = "") -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight of a linear layer as a matrix, and its bias, whichever form they are stored in.

        Args:
            linear: The layer.
            place: The prefix of the names.

        Raises:
            CheckpointError: If a weight is missing, or cannot be read.
        """
        name, shape = place + linear.name, (linear.outputs, linear.inputs)
        if linear.kernel:  # over merged patches, whose rows have the channels last
            kernel = self.read(f"{name}.weight")
            return kernel.permute(0, 2, 3, 1).reshape(shape).contiguous(), self._bias(linear, name)
        parts = [place + part for part in APART]
        if linear.name != JOINT or not {f"{part}.weight" for part in parts} <= set(self._program.weights):
            return self.read(f"{name}.weight", shape), self._bias(linear, name)
        weights = [self.read(f"{part}.weight") for part in parts]
        biases = [self.read(f"{part}.bias") for part in parts] if linear.bias else []
        return torch.cat(weights), torch.cat(biases) if biases else None

    def _bias(self, linear: Linear, name: str) -> torch.Tensor | None:
        return self.read(f"{name}.bias") if linear.bias else None

    def unfit(self, what: str) -> CheckpointError:
        """Return the error for weights that are not those of the configuration."""
        return CheckpointError(
            f"{self._program.folder}: the vision weights do not fit the configuration: {what}.",
            hint="The configuration and the weights belong to different models.",
        )
