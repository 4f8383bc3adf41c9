"""The layout of a call's rows in the tower: order, attention segments and rotary angles, cached by grids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch

from visionaccel.core.grid import Grid
from visionaccel.core.program import Program
from visionaccel.errors import PluginError

_MOST_KEPT = 16
"""Lists of grids whose layout is kept; in practice many calls have images of the same size."""


@dataclass(frozen=True, slots=True)
class Run:
    """Attention segments of one length that follow each other: rows `start` to `start + count * length`."""

    start: int
    count: int
    length: int

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.start + self.count * self.length


@dataclass(frozen=True)
class Layout:
    """One call's rows: P patches, grouped by token and in window order if there are windows; N tokens.

    Attributes:
        window_index: int64 [N]; the input token at each place. None without windows.
        reverse_index: int64 [N]; its inverse.
        rotation: complex64 [P, 1, head_dim / 2]; what each pair of a head's values is multiplied by.
        windows: The attention windows, those of one size as one run.
        frames: The frames, for full attention, in frame order.
        frame_order: int64 [P]; the row of the window order at each place of the frame order. None for a single frame,
            whose order does not matter, and without windows.
        frame_reverse: Its inverse.
        position_index: int64 [taps, P]; rows of the learned positions, in input order. None without them.
        position_weight: float32 [taps, P, 1]; what each is multiplied by.
    """

    window_index: torch.Tensor | None
    reverse_index: torch.Tensor | None
    rotation: torch.Tensor
    windows: tuple[Run, ...]
    frames: tuple[Run, ...]
    frame_order: torch.Tensor | None
    frame_reverse: torch.Tensor | None
    position_index: torch.Tensor | None
    position_weight: torch.Tensor | None


class Layouts:
    """Makes layouts from a program's tables and keeps the most recent ones on the device.

    Raises:
        PluginError: If the program has no tables.
    """

    def __init__(self, program: Program, device: str) -> None:
        if program.tables is None:
            raise PluginError(
                f"program {program.name!r} has no tables.",
                hint="Use visionaccel and its plug-ins from the same release.",
            )
        self._tables, self._device = program.tables, device
        self._of = lru_cache(maxsize=_MOST_KEPT)(self._make)

    def of(self, grids: Sequence[Grid]) -> Layout:
        """Return the layout of a call."""
        return self._of(tuple(grids))

    def _make(self, grids: tuple[Grid, ...]) -> Layout:
        tables = self._tables(grids)
        frames = _runs(tables, "frame_lengths")
        several = sum(run.count for run in frames) > 1
        order = self._put(tables, "frame_order") if several else None
        cos, sin = (torch.from_numpy(tables[name]).to(self._device) for name in ("rotary_cos", "rotary_sin"))
        return Layout(
            window_index=self._put(tables, "window_index"),
            reverse_index=self._put(tables, "reverse_index"),
            rotation=torch.complex(cos, sin)[:, None, :],
            windows=_runs(tables, "window_lengths"),
            frames=frames,
            frame_order=order,
            frame_reverse=None if order is None else torch.argsort(order),
            position_index=self._put(tables, "position_index"),
            position_weight=self._put(tables, "position_weight"),
        )

    def _put(self, tables: Mapping[str, Any], name: str) -> torch.Tensor | None:
        return torch.from_numpy(tables[name]).to(self._device) if name in tables else None


def _runs(tables: Mapping[str, Any], name: str) -> tuple[Run, ...]:
    runs, start = [], 0
    for length, alike in groupby(tables[name].tolist() if name in tables else ()):
        run = Run(start, len(list(alike)), length)
        runs.append(run)
        start = run.end
    return tuple(runs)
