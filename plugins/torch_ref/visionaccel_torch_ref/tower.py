"""A fast form of any described vision tower: windows in batches, rotation in place, packed weights.

The mathematics is that of transformers' towers. Only rounding differs: windows of one size are one batch of attention,
a head's values are rotated as complex numbers, and oneDNN fuses activations and sums into its products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from visionaccel.core.grid import Grid
from visionaccel.core.program import Program
from visionaccel.core.tower_spec import TowerSpec
from visionaccel.errors import PluginError
from visionaccel_torch_ref.layout import Layout, Layouts, Run
from visionaccel_torch_ref.linear import Attention, Linear, make_linear
from visionaccel_torch_ref.steps import Steps, in_blocks
from visionaccel_torch_ref.weights import WeightReader


@dataclass(frozen=True)
class _Block:
    norm1: Steps
    qkv: Linear
    proj: Steps
    mlp: Steps
    """With the norm before it."""
    windowed: bool
    levels: tuple[int, ...]


class FastTower:
    """The tower of a checkpoint on a device. Calls must not overlap.

    Args:
        program: Its description, tables and weights.
        dtype: For weights and arithmetic.
        attention: Computes attention of a batch of segments.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: If the weights do not fit the description.
        PluginError: If the program has no description or no tables.
    """

    @torch.no_grad()
    def __init__(self, program: Program, *, dtype: torch.dtype, attention: Attention, device: str) -> None:
        if program.spec is None:
            raise PluginError(
                f"program {program.name!r} has no description of its tower.",
                hint="Use visionaccel and its plug-ins from the same release.",
            )
        self._layouts = Layouts(program, device)
        self._attention = attention
        weights, spec = WeightReader(program, dtype, device), program.spec
        self._spec = spec
        self._embed = Steps(spec, spec.embed, weights)
        self._positions: torch.Tensor | None = None
        if spec.positions is not None:
            self._positions = weights.read(f"{spec.positions.name}.weight").float()
        self._blocks = tuple(_block(spec, block, weights) for block in range(spec.depth))
        self._merger = Steps(spec, spec.merger, weights)
        self._levels = tuple(
            Steps(spec, spec.deepstack_merger, weights, f"deepstack.{level}.") for level in range(len(spec.deepstack))
        )

    def __call__(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Return the embeddings [N, out_width] in the order of the grids.

        Args:
            patches: [P, patch_width], of the tower's dtype and on its device.
            grids: The grids of the call.
        """
        return self.forward(patches, self.layout(grids))

    def layout(self, grids: Sequence[Grid]) -> Layout:
        """Return the layout of a call's rows, on the device."""
        return self._layouts.of(grids)

    def forward(self, patches: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Compute a call with that layout: always the same kernels on the same tables, never waiting for the host."""
        rows = self._embed(patches)
        if self._positions is not None:
            rows = rows + _interpolated(self._positions, layout).to(rows.dtype)
        if layout.window_index is not None:
            tokens = rows.view(len(layout.window_index), -1)
            rows = tokens.index_select(0, layout.window_index).view(len(rows), -1)
        levels: list[torch.Tensor] = []
        for block in self._blocks:
            rows = block.proj.plus(self._attend(block, block.norm1(rows), layout), rows)
            rows = block.mlp.plus(rows, rows)
            levels += [self._levels[level](rows) for level in block.levels]
        merged = self._merger(rows)
        if levels:
            merged = torch.cat([merged, *levels], dim=1)
        return merged if layout.reverse_index is None else merged.index_select(0, layout.reverse_index)

    def _attend(self, block: _Block, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Compute the attention of every row within its window, or within its frame."""
        mixed = block.qkv(rows)
        heads = self._spec.heads
        _rotate(mixed.view(len(rows), 3 * heads, -1)[:, : 2 * heads], layout.rotation)
        if block.windowed:
            return self._by_runs(mixed, layout.windows)
        if layout.frame_order is None or layout.frame_reverse is None:
            return self._by_runs(mixed, layout.frames)
        attended = self._by_runs(mixed.index_select(0, layout.frame_order), layout.frames)
        return attended.index_select(0, layout.frame_reverse)

    def _by_runs(self, mixed: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
        """Compute the attention of [rows, 3 * hidden] within the segments of each run: [rows, hidden]."""
        pieces = []
        for run in runs:
            segments = mixed[run.start : run.end].view(run.count, run.length, 3, self._spec.heads, -1)
            query, key, value = segments.transpose(1, 3).unbind(2)
            attended = self._attention(query, key, value)
            pieces.append(attended.transpose(1, 2).reshape(run.count * run.length, -1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _block(spec: TowerSpec, number: int, weights: WeightReader) -> _Block:
    place = f"blocks.{number}."
    weight, bias = weights.read_linear(spec.qkv, place)
    qkv = make_linear(_paired(weight, spec.heads), None if bias is None else _paired(bias, spec.heads))
    return _Block(
        norm1=Steps(spec, (spec.norm1,), weights, place),
        qkv=qkv,
        proj=Steps(spec, (spec.proj,), weights, place),
        mlp=Steps(spec, (spec.norm2, *spec.mlp), weights, place),
        windowed=spec.windowed(number),
        levels=spec.levels_after(number),
    )


def _paired(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the joint projection's rows: each head's query and key rows i and i + head_dim / 2 become neighbours.

    Those are the pairs that rotary embedding rotates. Queries and keys are reordered alike, so their products are the
    same; values are not reordered.
    """
    split = rows.view(3, heads, 2, -1, *rows.shape[1:])
    paired = torch.empty_like(split).view(3, heads, -1, 2, *rows.shape[1:])
    paired[:2] = split[:2].transpose(2, 3)
    paired[2].view(split[2].shape).copy_(split[2])
    return paired.view(rows.shape)


def _rotate(heads: torch.Tensor, rotation: torch.Tensor) -> None:
    """Rotate [rows, heads, head_dim] in place, each pair as one complex number; in float32 as in transformers."""
    for block, turn in zip(in_blocks(heads), in_blocks(rotation), strict=True):
        wide = block.float()
        torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2)).mul_(turn)
        if wide is not block:
            block.copy_(wide)


def _interpolated(table: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Compute the learned positions of every patch, float32 [P, hidden]: one tap after the other, to save memory."""
    assert layout.position_index is not None
    assert layout.position_weight is not None
    taps = zip(layout.position_index, layout.position_weight, strict=True)
    index, weight = next(taps)
    total = table.index_select(0, index).mul_(weight)
    for index, weight in taps:
        total.addcmul_(table.index_select(0, index), weight)
    return total
