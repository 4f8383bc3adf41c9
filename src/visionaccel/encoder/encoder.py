"""The encoder that users call: patches and grids in, embeddings out, checked on both sides.

On any schedule of calls and closes, the device is given back once and never during a call, and calls overlap only if
every session is thread-safe.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np

from visionaccel.backends import Capabilities, EncodeReport, Purpose, Registry, Session, watch_parts
from visionaccel.core.arrays import Array, as_numpy, dtype_name, is_tensor, split_rows
from visionaccel.core.containment import device_errors, tell
from visionaccel.core.contracts import check_embeddings, check_output, check_patches
from visionaccel.core.cores import on_cores
from visionaccel.core.grid import Grid, GridLike, as_grids, total_patches
from visionaccel.core.program import AnyGrid, Bucket, Coverage, FixedGrid, Program
from visionaccel.errors import DeviceError, UnfitGridError
from visionaccel.families import Host, Tower


@dataclass
class OpenProgram:
    """A program that is open on a device: its session, and the host's part around it."""

    program: Program
    host: Host
    session: Session


class _Part(NamedTuple):
    """Frames of one item that go into a call; `start` is their first row in the patches."""

    start: int
    grid: Grid


class Encoder:
    """A vision tower on a backend. Safe to use from several threads; use as a context manager or call `close`.

    Attributes:
        tower: Sizes and tables of the vision tower.
        backend: Name of the backend.
        programs: The open programs; for a grid that several take, the most specific is used.
        options: The backend's options that were given.
        hooks: The hooks that observers implement.
    """

    def __init__(
        self,
        tower: Tower,
        backend: str,
        programs: Sequence[OpenProgram],
        registry: Registry,
        options: Mapping[str, Any] | None = None,
        cores: frozenset[int] | None = None,
    ) -> None:
        self.tower, self.backend, self.programs = tower, backend, tuple(programs)
        self.options = dict(options or {})
        self._cores = cores
        self.hooks = registry.plugins.hook
        safe = all(program.session.capabilities.thread_safe for program in self.programs)
        self._most_running = math.inf if safe else 1
        self._running = self._closers = 0
        self._idle = threading.Condition()
        self._closed = self._giving_back = self._given_back = False

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the first program's session: device and precision."""
        return self.programs[0].session.capabilities

    @property
    def coverages(self) -> tuple[Coverage, ...]:
        """The grids that each program takes."""
        return tuple(opened.program.coverage for opened in self.programs)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def program_for(self, grid: Grid) -> OpenProgram:
        """Return the program for a grid's frames: one made for them, else the smallest bucket, else one for any grid.

        Raises:
            UnfitGridError: If no program takes the grid.
        """
        fitting = [each for each in self.programs if self.tower.fits(each.program.coverage, grid.frame)]
        if not fitting:
            taken = "; ".join(sorted({str(each.program.coverage) for each in self.programs}))
            raise UnfitGridError(
                f"no program of this encoder accepts grid {grid}; accepted grids: {taken} (height x width in patches).",
                hint="Resize the image to such a grid, set VISIONACCEL_FALLBACK, or export a program for it.",
            )
        return min(fitting, key=_generality)

    def encode(
        self,
        patches: Array,
        grids: Iterable[GridLike],
        *,
        purpose: Purpose = "request",
        queue_seconds: float | None = None,
    ) -> Array:
        """Compute the embeddings of images and videos.

        Args:
            patches: float32, float16 or bfloat16 [P, patch_width], numpy or torch: the HF processor's `pixel_values`.
                They are only read, and not kept.
            grids: (t, h, w) in patches of each image or video, such as the processor's `image_grid_thw`.
            purpose: Why they are encoded, for observers.
            queue_seconds: Seconds that they waited before this call, for observers.

        Returns:
            float32 [N, out_width] with N = P / merge_size**2, in the order of the grids. numpy, or a torch tensor if
            the session takes tensors and was given one. It belongs to the caller.

        Raises:
            InputError: If patches and grids do not fit the model or each other, or hold NaN or infinity, or no program
                takes a grid.
            DeviceError: If the backend failed or returned something wrong.
        """
        with on_cores(self._cores):  # a runtime's pool computes on the thread that calls it, too
            if not self.hooks.visionaccel_encoded.get_hookimpls():
                return self._encode(patches, grids)[0]
            clock = _Clock()
            with watch_parts() as parts:
                embeddings, checked = self._encode(patches, grids, clock.lap)
            laps = clock.laps
            report = EncodeReport(
                backend=self.backend,
                device=self.capabilities.device,
                grids=checked,
                patches=total_patches(checked),
                tokens=len(embeddings),
                purpose=purpose,
                started=clock.started,
                queue_seconds=queue_seconds,
                check_seconds=laps["check"],
                prepare_seconds=laps["prepare"],
                run_seconds=laps["run"],
                transfer_in_seconds=parts.transfer_in,
                device_seconds=max(0.0, laps["run"] - parts.transfer_in - parts.transfer_out),
                transfer_out_seconds=parts.transfer_out,
                finish_seconds=laps["finish"],
                bytes_in=clock.bytes["prepare"],
                bytes_out=clock.bytes["finish"],
            )
            tell(partial(self.hooks.visionaccel_encoded, report=report))
            return embeddings

    def close(self, wait: float | None = None) -> bool:
        """Give back the device once no call is in progress. Later calls of `encode` raise DeviceError.

        May be called again, and from several threads: one gives it back, and the others wait for that.

        Args:
            wait: Seconds to wait for calls in progress, or for another thread that gives the device back; None to wait
                without limit. After that, the last call gives it back when it returns.

        Returns:
            Whether the device was given back.
        """
        with self._idle:
            self._closed = True
            self._idle.notify_all()
            self._closers += 1
            try:
                idle = self._idle.wait_for(lambda: self._given_back or self._free(), wait)
            finally:
                self._closers -= 1
            if not idle or self._given_back:
                return self._given_back
            self._giving_back = True
        self._give_back()
        return True

    def _free(self) -> bool:
        """With the lock held: whether this thread may give back the device."""
        return self._running == 0 and not self._giving_back

    def _give_back(self) -> None:
        try:
            close_programs(self.programs)
        finally:
            with self._idle:
                self._given_back = True
                self._idle.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encode(
        self, patches: Array, grids: Iterable[GridLike], lap: Callable[..., None] = lambda *_: None
    ) -> tuple[Array, tuple[Grid, ...]]:
        checked = as_grids(grids, self.tower.merge_size)
        check_patches(patches, checked, self.tower.patch_width)
        lap("check")
        calls = self._calls(checked)
        outputs: list[Array] = []
        for opened, parts in calls:
            call_grids = [part.grid for part in parts]
            rows = _rows(patches, parts)
            with self._device_errors(call_grids):
                inputs = opened.host.inputs(_to_session(rows, opened), call_grids)
            lap("prepare", inputs.values())
            with self._device_errors(call_grids), self._turn():
                found = opened.session.run(inputs)
            lap("run")
            outputs.append(self._checked(opened, found, call_grids))
            lap("finish", (found[spec.name] for spec in opened.program.outputs))
        embeddings = outputs[0] if len(calls) == 1 else self._in_item_order(outputs, [parts for _, parts in calls])
        lap("finish")
        return embeddings, checked

    def _calls(self, grids: Sequence[Grid]) -> list[tuple[OpenProgram, list[_Part]]]:
        """Plan the calls of the sessions.

        Items of a program for any grid go together, or by frame size if it needs uniform frames; every frame of the
        other items is a separate call.
        """
        together: dict[tuple[int, tuple[int, int] | None], tuple[OpenProgram, list[_Part]]] = {}
        single: list[tuple[OpenProgram, list[_Part]]] = []
        start = 0
        for grid in grids:
            opened = self.program_for(grid)
            if isinstance(opened.program.coverage, AnyGrid):
                size = (grid.h, grid.w) if opened.program.uniform_frames else None
                together.setdefault((id(opened), size), (opened, []))[1].append(_Part(start, grid))
            else:
                frame = grid.frame
                single += [(opened, [_Part(start + t * frame.patches, frame)]) for t in range(grid.t)]
            start += grid.patches
        return [*together.values(), *single]

    def _in_item_order(self, outputs: Sequence[Array], calls: Sequence[list[_Part]]) -> Array:
        """Return the embeddings of several calls in the order of the patches."""
        pieces: dict[int, Array] = {}
        for output, parts in zip(outputs, calls, strict=True):
            tokens = [part.grid.tokens(self.tower.merge_size) for part in parts]
            pieces |= zip((part.start for part in parts), split_rows(output, tokens), strict=True)
        return _join([pieces[start] for start in sorted(pieces)])

    def _device_errors(self, grids: Sequence[Grid]) -> AbstractContextManager[None]:
        """Turn what a backend or the host's part raises into a DeviceError that says where."""
        return device_errors(
            lambda: f"backend {self.backend!r} on grids {', '.join(map(str, grids))}",
            "Set VISIONACCEL_FALLBACK to let another backend take over.",
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for this call's turn on the session: at once if it is thread-safe, else after the call in progress."""
        with self._idle:
            self._idle.wait_for(lambda: self._closed or self._running < self._most_running)
            if self._closed:
                raise DeviceError("the encoder is closed.", hint="Open a new one.")
            self._running += 1
        try:
            yield
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()
                last = self._closed and self._closers == 0 and self._free()
                self._giving_back |= last
            if last:
                self._give_back()

    def _checked(self, opened: OpenProgram, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:
        """Return the embeddings of one call after checking that every output is what the program promises."""
        sizes = {
            "patches": total_patches(grids),
            "tokens": sum(grid.tokens(self.tower.merge_size) for grid in grids),
        }
        with self._device_errors(grids):
            for spec in opened.program.outputs:
                check_output(self.backend, spec, outputs.get(spec.name), sizes)
            rows = opened.host.embeddings(outputs, grids)
        check_embeddings(self.backend, rows, self.tower.spec.out)
        return rows


class _Clock:
    """Times the parts of one encode, and counts the bytes of the arrays that each part ends with."""

    def __init__(self) -> None:
        self.started = self._lap = time.monotonic()
        self.laps, self.bytes = defaultdict[str, float](float), defaultdict[str, int](int)

    def lap(self, part: str, arrays: Iterable[Array] = ()) -> None:
        """Add the time since the last lap to this part."""
        now = time.monotonic()
        self.laps[part] += now - self._lap
        self.bytes[part] += sum(int(array.nbytes) for array in arrays)
        self._lap = now


def close_programs(programs: Iterable[OpenProgram]) -> None:
    """Close every session, even if one fails to."""
    sessions = [opened.session for opened in programs]
    with ExitStack() as stack:
        for session in sessions:
            stack.callback(session.close)
        for session in sessions:
            session.begin_close()


def _generality(opened: OpenProgram) -> float:
    """Return the sort key of programs, from the most specific to the most general."""
    coverage = opened.program.coverage
    if isinstance(coverage, FixedGrid):
        return 0
    return coverage.patches if isinstance(coverage, Bucket) else math.inf


def _to_session(patches: Array, opened: OpenProgram) -> Array:
    """Convert patches to the program's dtype, on the host unless the session takes tensors; a view if none changes."""
    wanted = next((spec.dtype for spec in opened.program.inputs if spec.name == "pixel_values"), None)
    if wanted is None:  # the host's part embeds the patches itself
        return patches
    if opened.session.capabilities.takes_tensors and is_tensor(patches):
        return patches if dtype_name(patches) == wanted else patches.float()
    return np.ascontiguousarray(as_numpy(patches), dtype=wanted)


def _rows(patches: Array, parts: Sequence[_Part]) -> Array:
    """Return the patches of a call, whose parts are in order; a view if they are consecutive."""
    spans = [(start, start + grid.patches) for start, grid in parts]
    if all(end == start for (_, end), (start, _) in pairwise(spans)):
        return patches[spans[0][0] : spans[-1][1]]
    return _join([patches[start:end] for start, end in spans])


def _join(pieces: Sequence[Array]) -> Array:
    if len(pieces) == 1:
        return pieces[0]
    if is_tensor(pieces[0]):
        import torch

        return torch.cat(list(pieces))
    return np.concatenate(pieces)
