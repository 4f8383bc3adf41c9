"""Files that stay as they were when verified: detecting changes of files on disk, and sealed copies in memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

from visionaccel.errors import ChangedFileError, ConfigurationError

_T = TypeVar("_T")

_ATTEMPTS = 5
_FIRST_DESCRIPTOR = 3
"""Descriptors 0 to 2 are the standard streams, which are replaced in every child process."""

_MAPPED = "Set VISIONACCEL_WEIGHTS=mapped to read the weights directly from the files."


@dataclass(frozen=True, slots=True)
class FileState:
    """The attributes of a file that change when it is written, replaced or truncated.

    `modified` is when its content changed, and `changed`, which programs cannot set, when anything did, even the number
    of links; both in ns.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: Path | int) -> FileState:
        """Return the state of a file, or of an open descriptor."""
        found = os.stat(file)  # noqa: PTH116 - of a descriptor too
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def of_named(cls, file: Path) -> FileState:
        """Return the state of a file that was verified before; ChangedFileError if it is gone."""
        try:
            return cls.of(file)
        except OSError as error:
            raise changed_file(file) from error

    def require(self, file: Path, now: FileState | None = None) -> None:
        """Check that a file is still in this state; `now` is its current state, which is read by default.

        Raises:
            TouchedFileError: If only the change time differs.
            ChangedFileError: If anything else differs, or the file is gone.
        """
        now = now or self.of_named(file)
        if now != self:
            touched = replace(now, changed=self.changed) == self
            raise changed_file(file, TouchedFileError if touched else ChangedFileError)


class TouchedFileError(ChangedFileError):
    """Only the change time of a file differs.

    A new hard link or mode changes it without changing the content. So does a program that writes to the file and then
    sets its modification time back, so the content must be verified again.
    """


def changed_file(file: Path, error: type[ChangedFileError] = ChangedFileError) -> ChangedFileError:
    """Make the error for a file that changed after it was verified."""
    return error(
        f"{file} changed after it was verified, so nothing is opened from it.",
        hint="Restart to verify and use the current files.",
    )


def when_steady(attempt: Callable[[], _T]) -> _T:
    """Call `attempt`, which verifies and opens files from scratch, again if one of them is touched during the call.

    Raises ChangedFileError if a file changed, or was touched in every attempt.
    """
    for _ in range(_ATTEMPTS - 1):
        with suppress(TouchedFileError):
            return attempt()
    return attempt()


class MemoryFile:
    """Bytes in a sealed anonymous file (memfd), which no process can change, not even this one.

    It has no path on disk, so it cannot be replaced, rewritten or truncated. It counts as memory of the process that
    made it, and is freed with the last object or mapping that uses it.

    Attributes:
        fd: The descriptor of the sealed file; this object owns it.
        digest: The digest of its content.
        path: A path to open it by, in this process and in a child that inherits the descriptor.
    """

    def __init__(self, fd: int, digest: str) -> None:
        import fcntl

        sealed = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & sealed != sealed:
            raise ValueError(f"descriptor {fd} is not a sealed memory file")
        self.fd, self.digest = fd, digest
        self.path = Path("/proc/self/fd", str(fd))
        # Not at the end of the program, when something else may still read from it.
        weakref.finalize(self, os.close, fd).atexit = False

    @classmethod
    def write(cls, name: str, size: int, fill: Callable[[BinaryIO], str]) -> MemoryFile:
        """Make one of `size` bytes. `fill` must write all of them, in any order, and return their digest.

        Raises ConfigurationError if there is not enough memory, or if the system has no such files.
        """
        try:
            import fcntl

            made = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (ImportError, AttributeError, OSError) as error:
            raise ConfigurationError(
                f"weights cannot be copied into memory on this system: {error}", hint=_MAPPED
            ) from error
        fd = made
        try:
            fd = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
            os.ftruncate(fd, size)
            with open(fd, "r+b", closefd=False) as file:
                digest = fill(file)
            sealed = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, sealed)
            return cls(fd, digest)
        except BaseException as error:
            if fd != made:
                os.close(fd)
            if isinstance(error, OSError):
                raise ConfigurationError(f"{size} bytes cannot be copied into memory: {error}", hint=_MAPPED) from error
            raise
        finally:
            os.close(made)

    @classmethod
    def inherited(cls, fd: int, digest: str) -> MemoryFile:
        """Make one from a descriptor that the parent process passed, and keep it from processes started later."""
        os.set_inheritable(fd, False)
        return cls(fd, digest)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a memory file cannot be pickled; pass its descriptor to the other process")
