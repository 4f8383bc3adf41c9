"""The encoder users call: patches and grids in, embeddings out, checked on both sides."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
from pydantic import ValidationError

from visionaccel.arrays import Array, as_numpy, dtype_name, is_tensor
from visionaccel.backends import AUTO, EncodeReport, Registry, Session, default_registry, select
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.contracts import check_output, check_patches
from visionaccel.errors import DeviceError, SettingsError, VisionAccelError
from visionaccel.families import Tower, tower_of
from visionaccel.grid import Grid, GridLike, as_grids, total_patches
from visionaccel.program import Program

__all__ = ["Encoder", "open_encoder", "open_tower"]

logger = logging.getLogger(__name__)


class Encoder:
    """A vision tower on a backend. Safe to use from several threads; use as a context manager or call `close`.

    Attributes:
        tower: Sizes and tables of the vision tower.
        program: What the session runs.
        backend: Name of the backend.
        session: The open session; its `capabilities` tell device and precision.
    """

    def __init__(self, tower: Tower, program: Program, backend: str, session: Session, registry: Registry) -> None:
        self.tower, self.program, self.backend, self.session = tower, program, backend, session
        self._hooks = registry.plugins.hook
        self._most_running = sys.maxsize if session.capabilities.thread_safe else 1
        self._running = 0
        self._idle = threading.Condition()
        self._closed = False

    def encode(self, patches: Array, grids: Iterable[GridLike]) -> Array:
        """Embeddings of images and videos.

        Args:
            patches: float32, float16 or bfloat16 [P, patch_width], numpy or torch: the HF processor's `pixel_values`.
                Read only; not kept.
            grids: (t, h, w) in patches of each image or video, such as the processor's `image_grid_thw`.

        Returns:
            float32 [N, out_width] with N = P / merge_size**2, in the order of the grids. numpy, or a torch tensor if
            the session takes tensors and was given one. It belongs to the caller.

        Raises:
            InputError: If patches and grids do not fit the model or each other, or hold NaN or infinity.
            DeviceError: If the backend failed or returned something wrong.
        """
        started = time.perf_counter()
        checked = as_grids(grids, self.tower.merge_size)
        check_patches(patches, checked, self.tower.patch_width)
        check_ended = time.perf_counter()
        patches = self._to_session(patches)
        calls = self._calls(checked)
        run_seconds = finish_seconds = 0.0
        outputs = []
        for items in calls:
            part = [checked[i] for i in items]
            inputs = self.tower.inputs(self.program, _rows(patches, checked, items), part)
            run_started = time.perf_counter()
            output = self._run(inputs, part)
            run_ended = time.perf_counter()
            self._check(output, part)
            outputs.append(output)
            run_seconds += run_ended - run_started
            finish_seconds += time.perf_counter() - run_ended
        joined_from = time.perf_counter()
        embeddings = outputs[0] if len(calls) == 1 else self._in_item_order(outputs, calls, checked)
        ended = time.perf_counter()
        finish_seconds += ended - joined_from
        self._report(
            EncodeReport(
                backend=self.backend,
                device=self.session.capabilities.device,
                grids=checked,
                patches=total_patches(checked),
                tokens=len(embeddings),
                check_seconds=check_ended - started,
                prepare_seconds=ended - check_ended - run_seconds - finish_seconds,
                run_seconds=run_seconds,
                finish_seconds=finish_seconds,
            )
        )
        return embeddings

    def close(self) -> None:
        """Give back the device once no call is in progress. Later calls of `encode` raise DeviceError."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._running == 0)
            self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _calls(self, grids: Sequence[Grid]) -> list[list[int]]:
        """Items of each session call: all at once, or by frame size where the program demands uniform frames."""
        if not self.program.uniform_frames:
            return [list(range(len(grids)))]
        groups: dict[tuple[int, int], list[int]] = {}
        for item, grid in enumerate(grids):
            groups.setdefault((grid.h, grid.w), []).append(item)
        return list(groups.values())

    def _in_item_order(self, outputs: Sequence[Array], calls: Sequence[list[int]], grids: Sequence[Grid]) -> Array:
        """The embeddings of several calls, put into the order of the items."""
        pieces: list[Array] = [None] * len(grids)
        for output, items in zip(outputs, calls, strict=True):
            ends = np.cumsum([grids[i].tokens(self.tower.merge_size) for i in items]).tolist()
            for item, start, end in zip(items, [0, *ends[:-1]], ends, strict=True):
                pieces[item] = output[start:end]
        return _join(pieces)

    def _to_session(self, patches: Array) -> Array:
        """Patches in the program's dtype, on the host unless the session takes tensors; a view if nothing changes."""
        wanted = next(spec.dtype for spec in self.program.inputs if spec.name == "pixel_values")
        if self.session.capabilities.takes_tensors and is_tensor(patches):
            return patches if dtype_name(patches) == wanted else patches.float()
        return np.ascontiguousarray(as_numpy(patches), dtype=wanted)

    def _run(self, inputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:
        (spec,) = self.program.outputs
        try:
            with self._turn():
                return self.session.run(inputs).get(spec.name)
        except VisionAccelError:
            raise
        except Exception as error:
            listed = ", ".join(map(str, grids))
            raise DeviceError(
                f"backend {self.backend!r} failed on grids {listed}: {type(error).__name__}: {error}",
                hint="Set VISIONACCEL_FALLBACK to let another backend take over.",
            ) from error

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This call's turn on the session: at once if it is thread-safe, otherwise after the call in progress."""
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

    def _check(self, output: Array, grids: Sequence[Grid]) -> None:
        (spec,) = self.program.outputs
        sizes = {
            "patches": total_patches(grids),
            "tokens": sum(grid.tokens(self.tower.merge_size) for grid in grids),
        }
        check_output(self.backend, spec, output, sizes)

    def _report(self, report: EncodeReport) -> None:
        try:
            self._hooks.visionaccel_encoded(report=report)
        except Exception:  # An observer's fault must not cost the caller a finished encode.
            logger.exception("An observer of encodes failed.")


def open_tower(source: str | os.PathLike[str], revision: str | None = None) -> Tower:
    """The vision tower of a checkpoint folder or Hugging Face repository.

    Raises:
        CheckpointError: If the checkpoint cannot be had, is incomplete or damaged.
        UnsupportedArchitectureError: If its vision tower is not implemented.
    """
    return tower_of(locate_checkpoint(source, revision))


def open_encoder(
    source: str | os.PathLike[str] | Tower,
    *,
    backend: str = AUTO,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
) -> Encoder:
    """Open a checkpoint's vision encoder on a backend.

    Args:
        source: A checkpoint folder, a Hugging Face repository, or a tower from `open_tower`.
        backend: Name of an installed backend, or `auto` for the best that accepts.
        device: The backend's device; None for its default.
        options: The backend's options by name.
        registry: Where backends are found; the installed ones by default.

    Raises:
        ConfigurationError: If the backend is unknown, broken, refuses the program, or does not know an option.
        ArtifactError: If the checkpoint is broken or of an unsupported architecture.
        DeviceError: If the device fails to open the program.
    """
    registry = registry or default_registry()
    tower = source if isinstance(source, Tower) else open_tower(source)
    name, program = select(registry, tower, backend, device).require()
    chosen = registry.load(name)
    try:
        checked = chosen.options.model_validate(dict(options or {}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        known = ", ".join(chosen.options.model_fields) or "none"
        raise SettingsError(
            f"invalid options of backend {name!r}: {problems}.", hint=f"Options it takes: {known}."
        ) from error
    try:
        session = chosen.open(program, device, checked)
    except VisionAccelError:
        raise
    except Exception as error:
        raise DeviceError(
            f"backend {name!r} could not open the encoder of {tower.family}: {type(error).__name__}: {error}",
            hint="Run `visionaccel explain` for what it needs.",
        ) from error
    return Encoder(tower, program, name, session, registry)


def _rows(patches: Array, grids: Sequence[Grid], items: Sequence[int]) -> Array:
    """The rows of some items, in their order; a view if they are consecutive."""
    ends = np.cumsum([grid.patches for grid in grids]).tolist()
    starts = [0, *ends[:-1]]
    if list(items) == list(range(items[0], items[-1] + 1)):
        return patches[starts[items[0]] : ends[items[-1]]]
    return _join([patches[starts[i] : ends[i]] for i in items])


def _join(pieces: Sequence[Array]) -> Array:
    if is_tensor(pieces[0]):
        import torch

        return torch.cat(list(pieces))
    return np.concatenate(pieces)
