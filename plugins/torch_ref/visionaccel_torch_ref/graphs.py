"""CUDA graphs: the kernels of a call, captured for a list of grids that came again, and launched as one from then on.

Small images are where it helps: launching the kernels of a block one by one then takes longer than computing them.
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
"""Lists of grids whose graphs are kept. Each holds its inputs and its answer; what lies between is shared."""

_CAPTURING = threading.Lock()
"""Only one capture may be under way in a process."""

Replay: TypeAlias = Callable[[], None]
"""Computes again what was captured, from and into the same memory."""

Capture: TypeAlias = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
"""From a computation, which it may run, its replay and the tensor that this writes."""


class _Tower(Protocol):
    def layout(self, grids: Sequence[Grid]) -> Layout: ...

    def forward(self, patches: torch.Tensor, layout: Layout) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Captured:
    """A graph and the memory that it reads and writes.

    Attributes:
        replay: Computes `answer` from `patches`.
        patches: [P, patch_width]
        layout: Its tables are read in each replay, so they must live as long.
        answer: [N, out_width]
    """

    replay: Replay
    patches: torch.Tensor
    layout: Layout
    answer: torch.Tensor


class _Seen(Enum):
    """What is known of grids that have no graph."""

    ONCE = auto()
    TOO_LARGE = auto()
    """Memory ran out when they were captured."""


class GraphedTower:
    """A tower whose calls are replayed. Calls must not overlap, nor run on different streams.

    The first call of a list of grids is computed as it comes. The second is too, and is captured; the graph is kept
    only if its answer to the same patches has the same values, so that one never sees which calls are replayed. A graph
    that has not, or a capture that fails, ends all replays; where memory runs out, that list of grids is not captured.

    Args:
        tower: Computes the calls.
        capture: How they are captured.
    """

    def __init__(self, tower: _Tower, capture: Capture) -> None:
        self._tower, self._capture = tower, capture
        self._known: OrderedDict[tuple[Grid, ...], _Captured | _Seen] = OrderedDict()
        self._refused = False

    def __call__(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embeddings [N, out_width] in the order of the grids, in memory of the caller.

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
        """The call's graph, or why there is none."""
        if not torch.isfinite(answer).all():
            return _Seen.ONCE  # it could not be compared
        try:
            # Outside of inference mode, for later calls outside of it could not write to what is made inside.
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
            return self._refuse("a replayed graph's answer is not that of the call that it was captured from")
        return _Captured(replay, held, layout, replayed)

    def _refuse(self, reason: str) -> _Seen:
        self._refused = True
        self._known.clear()
        logger.warning("Calls are computed without CUDA graphs from now on: %s.", reason)
        return _Seen.ONCE


def cuda_capture(device: str) -> Capture:
    """Captures on a CUDA device, all graphs on one stream and in one pool of memory.

    They may share both because each answer is copied before the next replay begins.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        pool = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        # A capture that fails leaves its stream the current one; the outer context puts that right.
        with _CAPTURING, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            # Libraries allocate on their first use on a stream, which a capture does not allow.
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                answer = compute()
        return graph.replay, answer

    return capture
