"""CUDA graphs: the kernels of a call are captured when a list of grids repeats, and from then on launched as one.

This helps for small images, where launching the kernels of a block takes longer than computing them.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol, TypeAlias

import torch

from visionaccel.core.grid import Grid
from visionaccel_torch_ref.layout import Layout

logger = logging.getLogger(__name__)

_MOST_KEPT = 16
"""Lists of grids whose graphs are kept. Each has memory for its inputs and its answer; all other memory is shared."""

_CAPTURING = threading.Lock()
"""Only one capture may run in a process at a time."""

Replay: TypeAlias = Callable[[], None]
"""Repeats a captured computation, from and into the same memory."""

Capture: TypeAlias = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
"""Takes a computation, which it may run; returns its replay and the tensor that this writes to."""


class _Tower(Protocol):
    def layout(self, grids: Sequence[Grid]) -> Layout: ...

    def forward(self, patches: torch.Tensor, layout: Layout) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Captured:
    """A graph and the memory that it reads and writes.

    Attributes:
        replay: Computes `answer` from `patches`.
        patches: [P, patch_width]
        layout: Each replay reads its tables, so they must live as long.
        answer: [N, out_width]
    """

    replay: Replay
    patches: torch.Tensor
    layout: Layout
    answer: torch.Tensor


class _Seen(Enum):
    """The state of grids without a graph."""

    ONCE = auto()
    TOO_LARGE = auto()
    """Memory ran out during their capture."""


class GraphedTower:
    """A tower whose calls are replayed. Calls must not overlap, nor run on different streams.

    The first two calls of a list of grids are computed normally, and the second is also captured. The graph is kept
    only if its answer to the same patches has the same values, so that replayed calls give the same answers. If it has
    not, or a capture fails, no calls are replayed any more; if memory runs out, only those grids are not captured.
    """

    def __init__(self, tower: _Tower, capture: Capture) -> None:
        self._tower, self._capture = tower, capture
        self._known: OrderedDict[tuple[Grid, ...], _Captured | _Seen] = OrderedDict()
        self._refused = False

    def __call__(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Return the embeddings [N, out_width] in the order of the grids, in memory that the caller owns.

        Args:
            patches: [P, patch_width], of the tower's dtype and on its device.
            grids: The grids of the call.
        """
        key = tuple(grids)
        known = self._known.get(key)
        if isinstance(known, _Captured):
            self._known.move_to_end(key)
            known.patches.copy_(patches)
            known.replay()
            return known.answer.clone()
        layout = self._tower.layout(grids)
        answer = self._tower.forward(patches, layout)
        if known is None:
            known = _Seen.ONCE
        elif known is _Seen.ONCE:
            known = self._captured(patches, layout, answer)
        if not self._refused:
            self._known[key] = known
            self._known.move_to_end(key)
            if len(self._known) > _MOST_KEPT:
                self._known.popitem(last=False)
        return answer

    def _captured(self, patches: torch.Tensor, layout: Layout, answer: torch.Tensor) -> _Captured | _Seen:
        """Return the call's graph, or the state without one."""
        if not torch.isfinite(answer).all():
            return _Seen.ONCE  # NaN cannot be compared
        try:
            # Tensors that are made in inference mode could not be written to by later calls outside of it.
            with torch.inference_mode(False), torch.no_grad():
                held = patches.clone()
                replay, replayed = self._capture(lambda: self._tower.forward(held, layout))
                replay()
                same = torch.equal(replayed, answer)
        except torch.OutOfMemoryError:
            return _Seen.TOO_LARGE
        except RuntimeError as error:
            return self._refuse(f"torch {torch.__version__} cannot capture the tower: {error}")
        if not same:
            return self._refuse("a replayed graph's answer differs from that of the captured call")
        return _Captured(replay, held, layout, replayed)

    def _refuse(self, reason: str) -> _Seen:
        self._refused = True
        self._known.clear()
        logger.warning("CUDA graphs are not used from now on: %s.", reason)
        return _Seen.ONCE


def cuda_capture(device: str) -> Capture:
    """Capture on a CUDA device, all graphs on one stream and in one pool of memory.

    They may share both because each answer is copied before the next replay begins.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        # A failed capture leaves its stream current; the outer context restores the previous one.
        with _CAPTURING, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # Libraries allocate when first used on a stream, which is not allowed during a capture.
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                answer = compute()
        return graph.replay, answer

    return capture
