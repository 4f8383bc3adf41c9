"""The encoder users call: patches and grids in, embeddings out, checked on both sides."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
from pydantic import ValidationError

from visionaccel.arrays import Array, as_numpy, dtype_name, is_tensor
from visionaccel.backends import (
    AUTO,
    Capabilities,
    EncodeReport,
    Options,
    Registry,
    Session,
    VisionBackend,
    default_registry,
    select,
)
from visionaccel.bundle import Bundle, is_bundle, open_bundle
from visionaccel.checkpoint import locate_checkpoint
from visionaccel.contracts import check_output, check_patches
from visionaccel.cores import on_cores
from visionaccel.errors import DeviceError, SettingsError, UnfitGridError, VisionAccelError
from visionaccel.families import Host, Tower, tower_of
from visionaccel.grid import Grid, GridLike, as_grids, total_patches
from visionaccel.program import AnyGrid, Bucket, FixedGrid, Program

__all__ = ["Encoder", "OpenProgram", "WantedIsolation", "open_encoder", "open_source", "open_tower"]

logger = logging.getLogger(__name__)

WantedIsolation: TypeAlias = Literal["auto", "process", "none"]
"""Whether sessions live in child processes of their own; `auto` for what the backend declares."""


@dataclass
class OpenProgram:
    """A program on a device, with the host's part around it.

    Attributes:
        program: What the session runs.
        host: Makes its inputs and reads its outputs.
        session: The open session.
    """

    program: Program
    host: Host
    session: Session


@dataclass(frozen=True, slots=True)
class _Part:
    """Some frames of one item that go into a call."""

    item: int
    frames: slice
    grid: Grid


class Encoder:
    """A vision tower on a backend. Safe to use from several threads; use as a context manager or call `close`.

    Attributes:
        tower: Sizes and tables of the vision tower.
        backend: Name of the backend.
        programs: What it runs, each open on the device; for a grid that several take, the most specific is used.
        options: The backend's options that were given.
        capabilities: Those of the first program's session: device and precision.
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
        self._hooks = registry.plugins.hook
        safe = all(program.session.capabilities.thread_safe for program in self.programs)
        self._most_running = sys.maxsize if safe else 1
        self._running = 0
        self._idle = threading.Condition()
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """What the sessions are: their device and precision."""
        return self.programs[0].session.capabilities

    def program_for(self, grid: Grid) -> OpenProgram:
        """The program that runs frames of a grid: one made for it, else the smallest bucket, else one for any grid.

        Raises:
            UnfitGridError: If none takes it.
        """
        fitting = [each for each in self.programs if self.tower.fits(each.program.coverage, grid.frame)]
        if not fitting:
            taken = "; ".join(sorted({str(each.program.coverage) for each in self.programs}))
            raise UnfitGridError(
                f"no program of this encoder takes grid {grid}; they take: {taken} (height x width in patches).",
                hint="Resize the image to such a grid, set VISIONACCEL_FALLBACK, or export a program for it.",
            )
        return min(fitting, key=_generality)

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
            InputError: If patches and grids do not fit the model or each other, or hold NaN or infinity, or no program
                takes a grid.
            DeviceError: If the backend failed or returned something wrong.
        """
        with on_cores(self._cores):  # a runtime's pool computes on the thread that calls it, too
            return self._encode(patches, grids)

    def close(self) -> None:
        """Give back the device once no call is in progress. Later calls of `encode` raise DeviceError."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._running == 0)
            _close(self.programs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, patches: Array, grids: Iterable[GridLike]) -> Array:
        started = time.perf_counter()
        checked = as_grids(grids, self.tower.merge_size)
        check_patches(patches, checked, self.tower.patch_width)
        check_ended = time.perf_counter()
        calls = self._calls(checked)
        run_seconds = finish_seconds = 0.0
        outputs: list[Array] = []
        for opened, parts in calls:
            call_grids = [part.grid for part in parts]
            rows = _rows(patches, checked, parts)
            with self._as_device_error(call_grids):
                inputs = opened.host.inputs(_to_session(rows, opened), call_grids)
            run_started = time.perf_counter()
            found = self._run(opened, inputs, call_grids)
            run_ended = time.perf_counter()
            outputs.append(self._checked(opened, found, call_grids))
            run_seconds += run_ended - run_started
            finish_seconds += time.perf_counter() - run_ended
        joined_from = time.perf_counter()
        embeddings = outputs[0] if len(calls) == 1 else self._in_item_order(outputs, [parts for _, parts in calls])
        ended = time.perf_counter()
        finish_seconds += ended - joined_from
        self._report(
            EncodeReport(
                backend=self.backend,
                device=self.capabilities.device,
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

    def _calls(self, grids: Sequence[Grid]) -> list[tuple[OpenProgram, list[_Part]]]:
        """What each session call holds.

        Items of a program for any grid go together, or by frame size where it demands uniform frames; every frame of
        the other items is a call of its own.
        """
        together: dict[tuple[int, tuple[int, int] | None], tuple[OpenProgram, list[_Part]]] = {}
        single: list[tuple[OpenProgram, list[_Part]]] = []
        for item, grid in enumerate(grids):
            opened = self.program_for(grid)
            if isinstance(opened.program.coverage, AnyGrid):
                size = (grid.h, grid.w) if opened.program.uniform_frames else None
                part = _Part(item, slice(0, grid.t), grid)
                together.setdefault((id(opened), size), (opened, []))[1].append(part)
            else:
                single += [(opened, [_Part(item, slice(t, t + 1), grid.frame)]) for t in range(grid.t)]
        return [*together.values(), *single]

    def _in_item_order(self, outputs: Sequence[Array], calls: Sequence[list[_Part]]) -> Array:
        """The embeddings of several calls, put into the order of the items and their frames."""
        pieces: list[tuple[int, int, Array]] = []
        for output, parts in zip(outputs, calls, strict=True):
            ends = np.cumsum([part.grid.tokens(self.tower.merge_size) for part in parts]).tolist()
            for part, start, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
                pieces.append((part.item, part.frames.start, output[start:end]))
        return _join([piece for *_, piece in sorted(pieces, key=lambda piece: piece[:2])])

    def _run(self, opened: OpenProgram, inputs: Mapping[str, Array], grids: Sequence[Grid]) -> Mapping[str, Array]:
        with self._as_device_error(grids), self._turn():
            return opened.session.run(inputs)

    @contextmanager
    def _as_device_error(self, grids: Sequence[Grid]) -> Iterator[None]:
        """Whatever a backend or the host's part raises, as a DeviceError that says where."""
        try:
            yield
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

    def _checked(self, opened: OpenProgram, outputs: Mapping[str, Array], grids: Sequence[Grid]) -> Array:
        """The embeddings of one call, once every output is what the program promises."""
        sizes = {
            "patches": total_patches(grids),
            "tokens": sum(grid.tokens(self.tower.merge_size) for grid in grids),
        }
        for spec in opened.program.outputs:
            check_output(self.backend, spec, outputs.get(spec.name), sizes)
        with self._as_device_error(grids):
            return opened.host.embeddings(outputs, grids)

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


def open_source(source: str | os.PathLike[str] | Tower | Bundle) -> Tower | Bundle:
    """A bundle from a folder that is one, otherwise the tower of a checkpoint; what is open already stays as it is.

    Raises:
        BundleError: If the bundle is broken.
        CheckpointError: If the checkpoint is broken, or there is neither.
        UnsupportedArchitectureError: If the vision tower is not implemented.
    """
    if isinstance(source, Tower | Bundle):
        return source
    return open_bundle(source) if is_bundle(source) else open_tower(source)


def open_encoder(
    source: str | os.PathLike[str] | Tower | Bundle,
    *,
    backend: str = AUTO,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
    isolation: WantedIsolation = "auto",
    deadline: float = 120.0,
    open_deadline: float = 600.0,
    cores: Iterable[int] | None = None,
) -> Encoder:
    """Open a vision encoder on a backend.

    Args:
        source: A bundle folder, a checkpoint folder, a Hugging Face repository of a checkpoint, or an opened bundle or
            tower.
        backend: Name of an installed backend, or `auto` for the best that accepts.
        device: The backend's device; None for its default.
        options: The backend's options by name.
        registry: Where backends are found; the installed ones by default. Child processes look in the installed ones.
        isolation: Whether each session lives in a child process of its own; `auto` for what the backend declares.
        deadline: Seconds that a call in a child process may take before that is ended.
        open_deadline: Seconds that starting such a process and opening a program may take, compilation included.
        cores: Cores of the CPU that its threads run on, and as many threads unless the options say otherwise. The
            calling thread runs there during this call and those of `encode`. None for where that thread may run.

    Raises:
        ConfigurationError: If the backend is unknown, broken, refuses the program, or does not know an option; if the
            isolation is none of these; or if there is no such core.
        ArtifactError: If the bundle or checkpoint is broken or of an unsupported architecture.
        DeviceError: If the device fails to open a program.
    """
    if isolation not in get_args(WantedIsolation):
        raise SettingsError(
            f"there is no isolation {isolation!r}.", hint=f"Name one of: {', '.join(get_args(WantedIsolation))}."
        )
    registry = registry or default_registry()
    source = open_source(source)
    wanted = None if cores is None else frozenset(cores)
    with on_cores(wanted, strict=True):
        return _opened(source, registry, backend, device, options, isolation, (deadline, open_deadline), wanted)


def _opened(
    source: Tower | Bundle,
    registry: Registry,
    backend: str,
    device: str | None,
    options: Mapping[str, Any] | None,
    isolation: WantedIsolation,
    deadlines: tuple[float, float],
    cores: frozenset[int] | None,
) -> Encoder:
    """An encoder, opened by a thread that runs on its cores: backends count them when they are first asked."""
    name, programs = select(registry, source, backend, device).require()
    chosen = registry.load(name)
    try:
        checked = chosen.options.model_validate(dict(options or {}))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        known = ", ".join(chosen.options.model_fields) or "none"
        raise SettingsError(
            f"invalid options of backend {name!r}: {problems}.", hint=f"Options it takes: {known}."
        ) from error
    tower = source.tower if isinstance(source, Bundle) else source
    opened: list[OpenProgram] = []
    try:
        for program in programs:
            host = _host(tower, program)
            if (chosen.isolation_on(device) if isolation == AUTO else isolation) == "process":
                session = _open_isolated(chosen, program, device, checked, *deadlines)
            else:
                session = _open(chosen, program, device, checked)
            opened.append(OpenProgram(program, host, session))
    except BaseException:
        with suppress(Exception):  # What failed to open says more than what then failed to close.
            _close(opened)
        raise
    return Encoder(tower, name, opened, registry, options, cores)


def _close(programs: Iterable[OpenProgram]) -> None:
    """Close every session, even if one fails to."""
    with ExitStack() as stack:
        for opened in programs:
            stack.callback(opened.session.close)


def _host(tower: Tower, program: Program) -> Host:
    try:
        return tower.host(program)
    except VisionAccelError:
        raise
    except Exception as error:
        raise DeviceError(
            f"the host's part of program {program.name!r} cannot be prepared: {type(error).__name__}: {error}",
            hint="Export the program without --split-host.",
        ) from error


def _open(backend: VisionBackend, program: Program, device: str | None, options: Options) -> Session:
    try:
        return backend.open(program, device, options)
    except VisionAccelError:
        raise
    except Exception as error:
        raise DeviceError(
            f"backend {backend.name!r} could not open program {program.name!r} of {program.family}: "
            f"{type(error).__name__}: {error}",
            hint="Run `visionaccel explain` for what it needs.",
        ) from error


def _open_isolated(
    backend: VisionBackend,
    program: Program,
    device: str | None,
    options: Options,
    deadline: float,
    open_deadline: float,
) -> Session:
    from visionaccel.isolation import IsolatedSession, Limits  # needed by few, and it imports subprocess

    # Validated once more in the child, so under the names and with the values that the user gave.
    given = options.model_dump(by_alias=True, exclude_unset=True)
    limits = Limits(run=deadline, opening=open_deadline)
    return IsolatedSession(backend.name, program, device, given, limits=limits)


def _generality(opened: OpenProgram) -> tuple[int, int]:
    """Sorts programs from the most specific to the most general."""
    match opened.program.coverage:
        case FixedGrid():
            return 0, 0
        case Bucket(patches=patches):
            return 1, patches
        case _:
            return 2, 0


def _to_session(patches: Array, opened: OpenProgram) -> Array:
    """Patches in the program's dtype, on the host unless the session takes tensors; a view if nothing changes."""
    wanted = next((spec.dtype for spec in opened.program.inputs if spec.name == "pixel_values"), None)
    if wanted is None:  # The host embeds them, and knows best what to make of them.
        return patches
    if opened.session.capabilities.takes_tensors and is_tensor(patches):
        return patches if dtype_name(patches) == wanted else patches.float()
    return np.ascontiguousarray(as_numpy(patches), dtype=wanted)


def _rows(patches: Array, grids: Sequence[Grid], parts: Sequence[_Part]) -> Array:
    """The rows of some frames, in their order; a view if they are consecutive."""
    starts = np.cumsum([0, *(grid.patches for grid in grids)]).tolist()
    spans: list[tuple[int, int]] = []
    for part in parts:
        frame = part.grid.h * part.grid.w
        start = starts[part.item] + part.frames.start * frame
        end = starts[part.item] + part.frames.stop * frame
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, end))
    return _join([patches[start:end] for start, end in spans])


def _join(pieces: Sequence[Array]) -> Array:
    if len(pieces) == 1:
        return pieces[0]
    if is_tensor(pieces[0]):
        import torch

        return torch.cat(list(pieces))
    return np.concatenate(pieces)
