"""Opens a session in the current process, only from the files that were verified."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from visionaccel.backends import Options, Session, VisionBackend
from visionaccel.core.containment import device_errors
from visionaccel.core.digests import file_digest
from visionaccel.core.memory_files import FileState, changed_file, when_steady
from visionaccel.core.program import Program
from visionaccel.errors import PluginError


def open_session(backend: VisionBackend, program: Program, device: str | None, options: Options) -> Session:
    """Open a session of a program; its files are checked before and after the backend opens it.

    The session is opened again if a file of its artifact was touched in between.

    Raises:
        ChangedFileError: If a file is not what was verified, or changed in between.
        VisionAccelError: Unchanged, if the backend raised one.
        DeviceError: If the backend raised any other exception.
        PluginError: If the backend did not return a Session.
    """
    return when_steady(lambda: _open(backend, program, device, options))


def _open(backend: VisionBackend, program: Program, device: str | None, options: Options) -> Session:
    before = check_files(program)
    what = f"opening program {program.name!r} of {program.family} with backend {backend.name!r}"
    with device_errors(what, "Run `visionaccel explain` to see what the backend needs."):
        session = backend.open(program, device, options)
    if not isinstance(session, Session):
        raise PluginError(
            f"backend {backend.name!r} opened a {type(session).__name__}, which is not a visionaccel.backends.Session.",
            hint="Derive the session's class from visionaccel.backends.Session.",
        )
    try:
        check_files(program, before)
    except BaseException:
        with suppress(Exception):
            session.close()
        raise
    return session


def check_files(program: Program, before: Mapping[Path, FileState] | None = None) -> Mapping[Path, FileState]:
    """Check that the files that a program is opened from are those that were verified.

    Weight files must be unchanged since their header was read; copies in memory always are. The artifact and its
    companions must have the digests in the bundle's manifest, or the states in `before`.

    Returns:
        The state of each file of the artifact, to pass as `before` to the next call.

    Raises:
        ChangedFileError: If a file changed or is gone.
        BundleError: If an artifact cannot be read.
    """
    for file, origin in {each.file: each.origin for each in program.weights.values()}.items():
        if isinstance(origin, FileState):
            origin.require(file)
    states = before or {file: FileState.of_named(file) for file in program.files}
    for file, state in states.items():
        if before is None and file_digest(file) != program.files[file]:
            raise changed_file(file)
        state.require(file)
    return states
