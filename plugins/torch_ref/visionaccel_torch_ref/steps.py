"""The steps of a tower's description as functions of rows, with their weights."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from visionaccel.core.tower_spec import Activation, Gated, Merge, Norm, Step, TowerSpec
from visionaccel.core.tower_spec import Linear as LinearStep
from visionaccel_torch_ref.linear import ACTIVATIONS, Linear, make_linear
from visionaccel_torch_ref.weights import WeightReader

_CACHED_ROWS = 256
"""Rows to normalise or rotate at a time on a CPU: about 1 MB in float32 for the released towers."""

Rows = Callable[[torch.Tensor], torch.Tensor]


class Steps:
    """A sequence of steps.

    Args:
        spec: The tower.
        steps: The steps.
        weights: Reads their weights.
        place: The prefix of the names of their weights.
    """

    def __init__(self, spec: TowerSpec, steps: Sequence[Step], weights: WeightReader, place: str = "") -> None:
        def linear_of(step: LinearStep) -> Linear:
            return make_linear(*weights.read_linear(step, place))

        # The reader is not kept: it keeps alive the copy in memory that weights are read from.
        self._before: list[Rows] = []
        self._last: Linear | None = None
        for number, step in enumerate(steps):
            follows = steps[number + 1] if number + 1 < len(steps) else None
            match step:
                case Norm():
                    self._before.append(_norm(step, weights, place))
                case LinearStep() if isinstance(follows, Activation):
                    self._before.append(_activated(linear_of(step), follows))
                case LinearStep() if follows is None:
                    self._last = linear_of(step)
                case LinearStep():
                    self._before.append(linear_of(step))
                case Gated():
                    gate, up, down = (linear_of(each) for each in (step.gate, step.up, step.down))
                    self._before.append(_gated(gate, up, step))
                    self._last = down if follows is None else None
                    self._before += [] if follows is None else [down]
                case Merge():
                    self._before.append(lambda x: x.view(-1, spec.merged * x.shape[1]))
                case Activation() if number == 0 or not isinstance(steps[number - 1], LinearStep):
                    self._before.append(ACTIVATIONS[step.kind])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the steps to rows [rows, width]."""
        for step in self._before:
            x = step(x)
        return x if self._last is None else self._last(x)

    def plus(self, x: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        """Apply the steps, which end in a linear layer, and add a term of the same shape."""
        assert self._last is not None, "TowerSpec checks it"
        for step in self._before:
            x = step(x)
        return self._last.plus(x, term)


def _norm(step: Norm, weights: WeightReader, place: str) -> Rows:
    name, shape = place + step.name, (step.width,)
    weight = weights.read(f"{name}.weight")
    if step.kind == "rms":
        return lambda x: _rms_norm(x, weight, step.epsilon)
    bias = weights.read(f"{name}.bias")
    return lambda x: functional.layer_norm(x, shape, weight, bias, step.epsilon)


def _activated(linear: Linear, then: Activation) -> Rows:
    return lambda x: linear.activated(x, then.kind)


def _gated(gate: Linear, up: Linear, step: Gated) -> Rows:
    return lambda x: up.times(x, gate.activated(x, step.activation))


def _rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the rows divided by their root mean square, in float32 as in transformers, times a weight."""
    if rows.device.type != "cpu":
        return functional.rms_norm(rows, weight.shape, weight, epsilon)
    normed = torch.empty_like(rows)
    for block, result in zip(in_blocks(rows), in_blocks(normed), strict=True):
        wide = block.float()
        lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scales = lengths.square_().div_(wide.shape[-1]).add_(epsilon).rsqrt_()
        # Rounded before the weight is applied, as transformers does.
        result.copy_(wide * scales).mul_(weight)
    return normed


def in_blocks(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the rows in pieces whose float32 copies fit into a CPU core's cache; on other devices, in one piece."""
    return torch.split(rows, _CACHED_ROWS) if rows.device.type == "cpu" else (rows,)
