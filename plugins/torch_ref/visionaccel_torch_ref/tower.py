"""Qwen2.5-VL's vision tower, written to be fast: windows in batches, rotation in place, packed weights.

The mathematics is that of transformers' `Qwen2_5_VisionTransformerPretrainedModel`. What differs is rounding: windows
of one size are one batch of attention, a head's values are rotated as complex numbers, and oneDNN applies activations
and sums within its products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from visionaccel.core.grid import Grid
from visionaccel.core.program import Program
from visionaccel_torch_ref.attention import Attention
from visionaccel_torch_ref.layout import Layout, Layouts, Run
from visionaccel_torch_ref.linear import Linear, make_linear
from visionaccel_torch_ref.weights import WeightReader

__all__ = ["FastTower", "load_fast_tower"]

_EPSILON = 1e-6
"""Of every normalisation; transformers has it in code and not in the configuration."""

_CACHED_ROWS = 256
"""Rows that are normalised or rotated at a time on a CPU: about 1 MB in float32 for the released towers."""


@dataclass(frozen=True)
class _Block:
    norm1: torch.Tensor
    qkv: Linear
    proj: Linear
    norm2: torch.Tensor
    gate: Linear
    up: Linear
    down: Linear
    full: bool


class FastTower:
    """The tower of a checkpoint on a device. Calls must not overlap.

    Args:
        program: Its configuration and tables.
        weights: Reads its weights, of the tower's dtype and on its device.
        attention: Computes attention of a batch of segments.
        device: `cpu`, `cuda` or `cuda:N`.

    Raises:
        CheckpointError: If the weights do not fit the configuration.
        PluginError: If the program brings no tables.
    """

    def __init__(self, program: Program, weights: WeightReader, attention: Attention, device: str) -> None:
        self._layouts = Layouts(program, device)
        self._attention = attention
        sizes = {name: int(size) for name, size in program.config.items() if isinstance(size, int)}
        hidden, inner, self._heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_heads"]
        self._merged = sizes["spatial_merge_size"] ** 2
        merged, width = hidden * self._merged, program.inputs[0].shape[1]
        assert isinstance(width, int), "patches have a fixed width"
        full = frozenset(program.config["fullatt_block_indexes"])

        def norm(name: str) -> torch.Tensor:
            return weights.read(f"{name}.weight", (hidden,))

        def qkv(name: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
            return weights.read_joint(f"{name}.qkv.{kind}", [f"{name}.{part}.{kind}" for part in "qkv"], shape)

        def linear(name: str, rows: int, columns: int) -> Linear:
            return make_linear(weights.read(f"{name}.weight", (rows, columns)), weights.read(f"{name}.bias", (rows,)))

        self._embed = make_linear(weights.read("patch_embed.proj.weight", (hidden, width)), None)
        self._blocks = tuple(
            _Block(
                norm1=norm(f"blocks.{block}.norm1"),
                qkv=make_linear(
                    _paired(qkv(f"blocks.{block}.attn", "weight", (3 * hidden, hidden)), self._heads),
                    _paired(qkv(f"blocks.{block}.attn", "bias", (3 * hidden,)), self._heads),
                ),
                proj=linear(f"blocks.{block}.attn.proj", hidden, hidden),
                norm2=norm(f"blocks.{block}.norm2"),
                gate=linear(f"blocks.{block}.mlp.gate_proj", inner, hidden),
                up=linear(f"blocks.{block}.mlp.up_proj", inner, hidden),
                down=linear(f"blocks.{block}.mlp.down_proj", hidden, inner),
                full=block in full,
            )
            for block in range(sizes["depth"])
        )
        self._norm = norm("merger.ln_q")
        self._merge = linear("merger.mlp.0", merged, merged), linear("merger.mlp.2", sizes["out_hidden_size"], merged)
        if weights.left:
            raise weights.unfit(f"it has no place for {sorted(weights.left)[0]!r}")

    def __call__(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embeddings [N, out_width] in the order of the grids.

        Args:
            patches: [P, patch_width], of the tower's dtype and on its device.
            grids: The grids of the call.
        """
        return self.forward(patches, self.layout(grids))

    def layout(self, grids: Sequence[Grid]) -> Layout:
        """Where the rows of a call stand, on the device."""
        return self._layouts.of(grids)

    def forward(self, patches: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The call of that layout: the same kernels on the same tables each time, without a word to the host."""
        rows = self._reorder(self._embed(patches), layout.window_index)
        for block in self._blocks:
            attended = self._attend(block, _rms_norm(rows, block.norm1), layout)
            rows = block.proj.plus(attended, rows)
            normed = _rms_norm(rows, block.norm2)
            rows = block.down.plus(block.up.times(normed, block.gate.silu(normed)), rows)
        first, second = self._merge
        tokens = second(first.gelu(_rms_norm(rows, self._norm).view(len(layout.window_index), -1)))
        return tokens.index_select(0, layout.reverse_index)

    def _reorder(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return rows.view(len(tokens), -1).index_select(0, tokens).view(len(rows), -1)

    def _attend(self, block: _Block, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Attention of every row within its window, or within its frame."""
        mixed = block.qkv(rows)
        _rotate(mixed.view(len(rows), 3 * self._heads, -1)[:, : 2 * self._heads], layout.rotation)
        if not block.full:
            return self._by_runs(mixed, layout.windows)
        if layout.frame_order is None or layout.frame_reverse is None:
            return self._by_runs(mixed, layout.frames)
        attended = self._by_runs(mixed.index_select(0, layout.frame_order), layout.frames)
        return attended.index_select(0, layout.frame_reverse)

    def _by_runs(self, mixed: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
        """Attention of [rows, 3 * hidden] within the segments of each run: [rows, hidden]."""
        pieces = []
        for run in runs:
            segments = mixed[run.start : run.end].view(run.count, run.length, 3, self._heads, -1)
            query, key, value = segments.transpose(1, 3).unbind(2)
            attended = self._attention(query, key, value)
            pieces.append(attended.transpose(1, 2).reshape(run.count * run.length, -1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def load_fast_tower(program: Program, *, dtype: torch.dtype, attention: Attention, device: str) -> FastTower:
    """The tower with its weights; raises what `FastTower` does."""
    with torch.no_grad():
        return FastTower(program, WeightReader(program, dtype, device), attention, device)


def _paired(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of the joint projection with each head's query and key values i and i + head_dim / 2 beside each other.

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
    for block, turn in zip(_blocks(heads), _blocks(rotation), strict=True):
        wide = block.float()
        torch.view_as_complex(wide.view(*wide.shape[:-1], -1, 2)).mul_(turn)
        if wide is not block:
            block.copy_(wide)


def _rms_norm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows divided by their root mean square, in float32 as in transformers, times a weight."""
    if rows.device.type != "cpu":
        return functional.rms_norm(rows, weight.shape, weight, _EPSILON)
    normed = torch.empty_like(rows)
    for block, result in zip(_blocks(rows), _blocks(normed), strict=True):
        wide = block.float()
        lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scales = lengths.square_().div_(wide.shape[-1]).add_(_EPSILON).rsqrt_()
        # Rounded before the weight is applied, as transformers does.
        result.copy_(wide * scales).mul_(weight)
    return normed


def _blocks(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Rows in pieces whose float32 copies stay in the cache of a CPU core; on other devices, in one."""
    return torch.split(rows, _CACHED_ROWS) if rows.device.type == "cpu" else (rows,)
