"""Level 5: broken files, lost and hanging devices, no memory, NaN: the right error, and later calls are correct."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from visionaccel.backends import Registry, select
from visionaccel.core.grid import total_patches
from visionaccel.encoder import Encoder, open_source
from visionaccel.errors import ArtifactError, DeviceError, DeviceLostError, OutputError, VisionAccelError
from visionaccel.isolation import IsolatedSession
from visionaccel_testing.conformance.check import CheckFailedError, Checks, NotApplicableError, must_raise
from visionaccel_testing.conformance.fresh_process import in_fresh_process
from visionaccel_testing.conformance.kit import Kit, Subject, Weights, encoded, first_call, grids_of, patches_for

FAULTS = Checks(5)

_RECOVERY = 120.0
"""Seconds within which a lost device must answer again: its process restarts and opens the program."""

_HANG = 4.0
"""The deadline of calls in the check of a hang, in seconds."""

_LEFT = (4 * 2**20, 2**20, 0)
"""Bytes that a device's process may still allocate: enough for the core to pass it the call, and then less."""

_UNDER_WAY = 1.0
"""Seconds after which a call has certainly reached the device's process; it takes milliseconds."""


@FAULTS.add
def truncated(kit: Kit) -> None:
    """Weights or a program that were cut short are refused; nothing is computed from missing data."""
    subject = kit.copy_of(kit.subject, "truncated")
    in_fresh_process(_open_truncated, subject)


@FAULTS.add
def tampered(kit: Kit) -> None:
    """A bundle whose file was changed is refused."""
    if kit.subject.source == kit.subject.checkpoint:
        raise NotApplicableError("it opens checkpoints, whose files have no digests.")
    subject = kit.copy_of(kit.subject, "tampered")
    largest = _largest([path for path in subject.source.rglob("*") if path.is_file() and path.suffix != ".json"])
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x55
    largest.write_bytes(data)
    with must_raise(ArtifactError, f"a bundle is opened although {largest.name} was changed."):
        subject.open().close()


@FAULTS.add
def failed_call(kit: Kit) -> None:
    """A call that fails inside the session leaves it usable."""
    in_fresh_process(_fail_inside, kit.subject)


@FAULTS.add
def nan_output(kit: Kit) -> None:
    """If the weights make every embedding NaN, the call fails and returns no numbers."""
    subject = kit.subject_of("nan", edit=_poison)
    try:
        encoder = subject.open()
    except VisionAccelError:
        return  # it checks the weights
    with encoder:
        grids = kit.calls[0]
        try:
            found = encoded(encoder, kit.patches(grids), grids)
        except (OutputError, DeviceError):
            return
        raise CheckFailedError(
            f"a layer's weights are NaN, but the answer is {found[0, :4]}...: something replaces NaN with numbers, so "
            "a broken device would also seem to answer."
        )


@FAULTS.add
def device_lost(kit: Kit) -> None:
    """If the device's process dies, its call fails with DeviceLostError, and a new process answers correctly."""
    with _isolated(kit) as device, ThreadPoolExecutor(1) as pool:
        device.process.suspend()  # so that the call is still in it when it dies
        call = pool.submit(device.encode)
        time.sleep(_UNDER_WAY)
        device.process.kill()
        with must_raise(DeviceLostError, "a call was answered by a process that was stopped and killed."):
            call.result()
        device.recovers("whose process was killed")
        if device.session.restarts < 1:
            raise CheckFailedError("the process of the device was killed and no new one was started.")


@FAULTS.add
def hang(kit: Kit) -> None:
    """A call that hangs past the deadline fails in time with DeviceLostError, and later calls are correct."""
    with _isolated(kit, deadline=_HANG) as device:
        device.process.suspend()
        began = time.monotonic()
        with must_raise(DeviceLostError, "a stopped process answered."):
            device.encode()
        lasted = time.monotonic() - began
        if lasted > 10 * _HANG:
            raise CheckFailedError(f"a call of a stopped process ended after {lasted:.0f} s, not {_HANG:g} s.")
        device.recovers("that hung")


@FAULTS.add
def allocation(kit: Kit) -> None:
    """Without memory a call fails with an error or ends the device's process; later calls are correct."""
    with _isolated(kit) as device:
        # A call that is larger than those before must allocate memory.
        larger = max(kit.calls, key=total_patches)
        patches = kit.patches(larger, 91)
        right = kit.encode(patches, larger)
        limits = device.process.rlimit(psutil.RLIMIT_AS)
        size = device.process.memory_info().vms
        failed = False
        for left in _LEFT:
            device.process.rlimit(psutil.RLIMIT_AS, (size + left, limits[1]))
            try:
                found = encoded(device.encoder, patches, larger)
            except DeviceError:
                failed = True
                break
            kit.same(found, right, f"a call with {left // 2**20} MiB of memory left")
        if device.session.pid == device.process.pid:
            device.process.rlimit(psutil.RLIMIT_AS, limits)
        device.recovers("that had no memory")
        if not failed:
            raise NotApplicableError("its calls allocate no memory, and were correct with none left.")


class _Device:
    """The backend in a child process, and a small call of it."""

    def __init__(self, kit: Kit, encoder: Encoder) -> None:
        self._kit, self.encoder = kit, encoder
        session = encoder.program_for(kit.calls[0][0]).session
        assert isinstance(session, IsolatedSession)
        assert session.pid is not None
        self.session, self.process = session, psutil.Process(session.pid)
        self.encode = first_call(encoder, kit.seed)
        self._exact = self.encode()

    def recovers(self, what: str) -> None:
        """Fail unless calls are correct again in time; until then they may raise DeviceError."""
        limit = time.monotonic() + _RECOVERY
        while True:
            try:
                found = self.encode()
            except DeviceError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.05)
            else:
                self._kit.same(found, self._exact, f"the first answer of a device {what}")
                return


@contextmanager
def _isolated(kit: Kit, deadline: float = 60.0) -> Iterator[_Device]:
    with kit.subject.open(isolation="process", deadline=deadline) as encoder:
        yield _Device(kit, encoder)


def _poison(weights: Weights) -> None:
    """Make one bias NaN, in a layer that every token goes through."""
    weights["visual.blocks.0.attn.proj.bias"][:] = np.nan


def _largest(files: list[Path]) -> Path:
    return max(files, key=lambda path: path.stat().st_size)


def _open_truncated(subject: Subject) -> None:
    """Open and run a program whose largest file is cut in half after the core checked it."""
    registry, source = Registry(), open_source(subject.source)
    backend = registry.load(subject.backend)
    program = select(registry, source, subject.backend, subject.device).require()[1][0]
    with subject.open() as encoder:
        grid = next(
            call[0].frame
            for call in grids_of(encoder)
            if encoder.program_for(call[0].frame).program.coverage == program.coverage
        )
    inputs = source.tower.host(program).inputs(patches_for([grid], subject.seed), [grid])
    options = backend.options.model_validate(dict(subject.options))

    def run() -> None:
        with closing(backend.open(program, subject.device, options)) as session:
            session.run(inputs)

    run()
    # The program itself reads its artifact, or the weights.
    largest = _largest([program.artifact] if program.artifact else [each.file for each in program.weights.values()])
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    try:
        run()
    except Exception:
        return  # the core turns any error into a DeviceError
    raise CheckFailedError(
        f"half of {largest.name} is missing, but the program answers: missing data is read as numbers."
    )


def _fail_inside(subject: Subject) -> None:
    """Call a session with invalid inputs, which may raise anything; a valid call must then be correct."""
    with subject.open() as encoder:
        grids = grids_of(encoder)[0]
        frame = grids[0].frame
        patches = patches_for(grids, subject.seed)
        exact = encoded(encoder, patches, grids)
        opened = encoder.program_for(frame)
        for what, given in _broken(opened.host.inputs(patches[: frame.patches], [frame])):
            try:
                opened.session.run(given)
            except Exception:
                found = encoded(encoder, patches, grids)
            else:
                raise CheckFailedError(f"a session runs on inputs where {what}.")
            if encoder.capabilities.deterministic and not np.array_equal(found, exact):
                raise CheckFailedError(f"after a call that failed because {what}, a valid call gets a wrong answer.")


def _broken(inputs: Mapping[str, NDArray[np.generic]]) -> Iterator[tuple[str, dict[str, NDArray[np.generic]]]]:
    name = max(inputs, key=lambda each: inputs[each].nbytes)
    yield f"{name!r} is missing", {other: array for other, array in inputs.items() if other != name}
    yield f"{name!r} is too narrow", {**inputs, name: np.ascontiguousarray(inputs[name][..., :-1])}
