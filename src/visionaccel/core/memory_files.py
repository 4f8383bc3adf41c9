"""Files that stay what they were when they were verified: how a file on disk is recognised, and copies in memory."""

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
"""The three below are standard input and output, which every child process gets replaced."""

_MAPPED = "Set VISIONACCEL_WEIGHTS=mapped to read the weights where they lie."


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes when a file is written, replaced or cut short. Programs cannot set the change time.

    Times are in ns: `modified` is of the content, `changed` of anything, the number of links included.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: Path | int) -> FileState:
        """The state of a file, or of an open descriptor."""
        found = os.stat(file)  # noqa: PTH116 - of a descriptor too
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def of_named(cls, file: Path) -> FileState:
        """The state of a file that was verified before; ChangedFileError if it is gone."""
        try:
            return cls.of(file)
        except OSError as error:
            raise changed_file(file) from error

    def require(self, file: Path) -> None:
        """Raise ChangedFileError unless a file is in this state."""
        self.require_same(self.of_named(file), file)

    def require_same(self, now: FileState, file: Path) -> None:
        """Require that the state of a file now is this one.

        Raises:
            TouchedFileError: If only the change time differs.
            ChangedFileError: If anything else does.
        """
        if now != self:
            touched = replace(now, changed=self.changed) == self
            raise changed_file(file, TouchedFileError if touched else ChangedFileError)


class TouchedFileError(ChangedFileError):
    """Only the change time of a file differs.

    A hard link or a new mode does that, and leaves the content alone. So does a program that writes to the file and
    sets its modification time back: only the content tells the two apart.
    """


def changed_file(file: Path, error: type[ChangedFileError] = ChangedFileError) -> ChangedFileError:
    """The error for a file that is not what was verified."""
    return error(
        f"{file} changed after it was verified, and nothing is opened from it.",
        hint="Restart to verify and use the files that are there now.",
    )


def when_steady(attempt: Callable[[], _T]) -> _T:
    """Verify and open files from scratch by `attempt`, which is repeated if one of them is touched in the attempt.

    ChangedFileError if a file changed, or was touched during every attempt.
    """
    for _ in range(_ATTEMPTS - 1):
        with suppress(TouchedFileError):
            return attempt()
    return attempt()


class MemoryFile:
    """Bytes in an anonymous file (memfd) that the kernel lets no process change, not even this one.

    No path on disk leads to it, so it cannot be replaced, rewritten or truncated. It counts as memory of the process
    that made it, and is gone with the last object or mapping that uses it.

    Attributes:
        fd: The descriptor of a sealed file, which belongs to this object.
        digest: What identifies its content.
        path: Where any code can open it, in this process and in a child that inherits the descriptor.
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
        """A new one of `size` bytes, all of which `fill` writes, in any order, before it returns their digest.

        ConfigurationError if there is no memory for it, or the system has no such files.
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
        """The one behind a descriptor that a parent process left open; processes started later do not get it."""
        os.set_inheritable(fd, False)
        return cls(fd, digest)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a memory file cannot be pickled; another process gets it by its descriptor")
