"""Level 5: broken files, lost and hanging devices, no memory, NaN: the right error, and nothing else is harmed."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionaccel.backends import Accepted, Registry
from visionaccel.bundle import Bundle
from visionaccel.core.arrays import as_numpy
from visionaccel.core.grid import total_patches
from visionaccel.encoder import Encoder, open_source
from visionaccel.errors import ArtifactError, DeviceError, DeviceLostError, OutputError, VisionAccelError
from visionaccel.isolation import IsolatedSession
from visionaccel_testing.conformance.check import CheckFailedError, Checks, NotApplicableError
from visionaccel_testing.conformance.fresh_process import in_fresh_process
from visionaccel_testing.conformance.kit import Kit
from visionaccel_testing.conformance.subject import Subject, grids_of, patches_for

FAULTS = Checks(5)

_RECOVERY = 120.0
"""Seconds until a lost device must answer again: its process restarts and opens the program."""

_HANG = 4.0
"""Seconds of a call in the check of a hang."""

_LEFT = (4 * 2**20, 2**20, 0)
"""Bytes that a device's process may still take: enough for the core to hand it the call, and then less."""

_UNDER_WAY = 1.0
"""Seconds after which a call has surely reached the device's process; it takes milliseconds."""


@FAULTS.add
def truncated(kit: Kit) -> None:
    """Weights or a program that end too early are refused; nothing is computed from what is not there."""
    subject = kit.copy_of(kit.subject, "truncated")
    in_fresh_process(_open_truncated, subject)


@FAULTS.add
def tampered(kit: Kit) -> None:
    """A bundle whose file was changed is refused."""
    if kit.subject.source == kit.subject.checkpoint:
        raise NotApplicableError("it opens checkpoints, whose files state no digests.")
    subject = kit.copy_of(kit.subject, "tampered")
    files = [path for path in subject.source.rglob("*") if path.is_file() and path.suffix != ".json"]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x55
    largest.write_bytes(data)
    try:
        subject.open(registry=kit.registry).close()
    except ArtifactError:
        return
    raise CheckFailedError(f"a bundle is opened although {largest.name} was changed.")


@FAULTS.add
def failed_call(kit: Kit) -> None:
    """A call that fails inside the session leaves it usable."""
    in_fresh_process(_fail_inside, kit.subject)


@FAULTS.add
def nan_output(kit: Kit) -> None:
    """Weights that make NaN of every image end in an error, not in numbers."""
    subject = kit.subject_of("nan", edit=_poisoned)
    try:
        encoder = subject.open(registry=kit.registry)
    except VisionAccelError:
        return  # It looked at the weights.
    with encoder:
        grids = kit.calls[0]
        try:
            found = encoder.encode(kit.patches(grids), grids)
        except (OutputError, DeviceError):
            return
        shown = np.asarray(as_numpy(found))[0, :4]
        raise CheckFailedError(
            f"a layer's weights are NaN, and the answer is {shown}...: NaN is replaced by numbers somewhere, so a "
            "broken device would answer, too."
        )


@FAULTS.add
def device_lost(kit: Kit) -> None:
    """If the process of the device dies, the call in it fails as DeviceLostError, and a new one answers right."""
    with _isolated(kit) as (_, session, encode, exact), ThreadPoolExecutor(1) as pool:
        pid = session.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # so that the call is still in it when it dies
        call = pool.submit(encode)
        time.sleep(_UNDER_WAY)
        os.kill(pid, signal.SIGKILL)
        try:
            call.result()
        except DeviceLostError:
            pass
        else:
            raise CheckFailedError("a call was answered by a process that was stopped and killed.")
        _recovers(kit, encode, exact, "whose process was killed")
        if session.restarts < 1:
            raise CheckFailedError("the process of the device was killed and no new one was started.")


@FAULTS.add
def hang(kit: Kit) -> None:
    """If a call hangs past the deadline, it fails as DeviceLostError in time, and later ones are right."""
    with _isolated(kit, deadline=_HANG) as (_, session, encode, exact):
        pid = session.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            encode()
        except DeviceLostError:
            lasted = time.monotonic() - began
        else:
            raise CheckFailedError("a stopped process answered.")
        if lasted > 10 * _HANG:
            raise CheckFailedError(f"a call of a stopped process ended after {lasted:.0f} s, not {_HANG:g} s.")
        _recovers(kit, encode, exact, "that hung")


@FAULTS.add
def allocation(kit: Kit) -> None:
    """Without memory a call fails with an error or ends the device's process; later calls are right."""
    with _isolated(kit) as (encoder, session, encode, exact):
        pid = session.pid
        assert pid is not None
        # A call that is larger than those before must take more memory.
        larger = max(kit.calls, key=total_patches)
        patches = kit.patches(larger, 91)
        right = kit.encode(patches, larger)
        limits = resource.prlimit(pid, resource.RLIMIT_AS)
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        failed = False
        for left in _LEFT:
            resource.prlimit(pid, resource.RLIMIT_AS, (size + left, limits[1]))
            try:
                found = encoder.encode(patches, larger)
            except DeviceError:
                failed = True
                break
            kit.same(np.asarray(as_numpy(found)), right, f"a call with {left // 2**20} MiB of memory left")
        if session.pid == pid:
            resource.prlimit(pid, resource.RLIMIT_AS, limits)
        _recovers(kit, encode, exact, "that had no memory")
        if not failed:
            raise NotApplicableError("its calls take no memory beyond what it holds, and were right with none left.")


def _recovers(kit: Kit, encode: Callable[[], NDArray[np.float32]], exact: NDArray[np.float32], what: str) -> None:
    """Fail unless calls are answered right again in time; until then they may fail as DeviceError."""
    limit = time.monotonic() + _RECOVERY
    while True:
        try:
            found = encode()
        except DeviceError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.05)
        else:
            kit.same(found, exact, f"the first answer of a device {what}")
            return


@contextmanager
def _isolated(
    kit: Kit, deadline: float = 60.0
) -> Iterator[tuple[Encoder, IsolatedSession, Callable[[], NDArray[np.float32]], NDArray[np.float32]]]:
    """The backend in a child process: encoder, session, a small call, and its right answer."""
    grids = kit.calls[0]
    patches = kit.patches(grids, 90)
    with kit.subject.open(registry=kit.registry, isolation="process", deadline=deadline) as encoder:
        session = encoder.program_for(grids[0]).session
        assert isinstance(session, IsolatedSession)

        def encode() -> NDArray[np.float32]:
            return np.array(as_numpy(encoder.encode(patches, grids)))

        yield encoder, session, encode, encode()


def _poisoned(checkpoint: Path) -> None:
    """Makes one bias NaN, in a layer that every token goes through."""
    from safetensors.numpy import load_file, save_file

    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if name.endswith("blocks.0.attn.proj.bias"))
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, file)


def _open_truncated(subject: Subject) -> None:
    """Opens and runs a program whose largest file lost its second half after the core had looked at it."""
    backend = Registry().load(subject.backend)
    source = open_source(subject.source)
    tower = source.tower if isinstance(source, Bundle) else source
    programs = source.programs(backend.formats_on(subject.device))
    program = next(each for each in programs if isinstance(backend.probe(each, subject.device), Accepted))
    host = tower.host(program)
    with subject.open() as encoder:
        grid = next(
            call[0].frame
            for call in grids_of(encoder)
            if encoder.program_for(call[0].frame).program.coverage == program.coverage
        )
    inputs = host.inputs(patches_for([grid], subject.seed), [grid])

    def run() -> None:
        session = backend.open(program, subject.device, backend.options.model_validate(dict(subject.options)))
        try:
            session.run(inputs)
        finally:
            session.close()

    run()  # as it is, it runs
    # What the program itself reads: its artifact, or the weights.
    files = [program.artifact] if program.artifact else sorted({stored.file for stored in program.weights.values()})
    largest = max(files, key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    try:
        run()
    except Exception:
        return  # Any: the core makes a DeviceError of errors that are not its own.
    raise CheckFailedError(
        f"half of {largest.name} is gone, and the program answers: what is not there is read as something."
    )


def _fail_inside(subject: Subject) -> None:
    """Calls sessions with inputs that no program takes; any exception will do, and then a right call must be right."""
    with subject.open() as encoder:
        grids = list(grids_of(encoder)[0])
        patches = patches_for(grids, subject.seed)
        exact = np.array(as_numpy(encoder.encode(patches, grids)))
        for opened in encoder.programs:
            frame = grids[0].frame
            if encoder.program_for(frame) is not opened:
                continue
            inputs = dict(opened.host.inputs(patches[: frame.patches], [frame]))
            for what, given in _broken(inputs):
                try:
                    opened.session.run(given)
                except Exception as error:
                    failed: Exception | None = error
                else:
                    failed = None
                if failed is None:
                    raise CheckFailedError(f"a session runs on inputs where {what}.")
                found = np.asarray(as_numpy(encoder.encode(patches, grids)))
                if not np.array_equal(found, exact) and encoder.capabilities.deterministic:
                    raise CheckFailedError(
                        f"after a call that failed because {what}, a right call gets a wrong answer."
                    )


def _broken(inputs: Mapping[str, NDArray[np.generic]]) -> Iterator[tuple[str, dict[str, NDArray[np.generic]]]]:
    name = max(inputs, key=lambda each: np.asarray(inputs[each]).nbytes)
    yield f"{name!r} is missing", {other: array for other, array in inputs.items() if other != name}
    array = np.asarray(inputs[name])
    yield f"{name!r} is too narrow", {**inputs, name: np.ascontiguousarray(array[..., :-1])}
