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

__all__ = ["FileState", "MemoryFile", "TouchedFileError", "changed_file", "when_steady"]

_T = TypeVar("_T")

_FIRST_DESCRIPTOR = 3
"""The three below are standard input and output, which every child process gets replaced."""

_MAPPED = "Set VISIONACCEL_WEIGHTS=mapped to read the weights where they lie."


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes when a file is written, replaced or cut short. Programs cannot set the change time.

    Attributes:
        device: The device that it lies on.
        inode: Its number there.
        size: Bytes.
        modified: When its content changed last, in units of 1e-9 s.
        changed: When anything of it changed last, its number of links included.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, file: Path | int) -> FileState:
        """The state of a file, or of an open descriptor.

        Raises:
            OSError: If it is not there.
        """
        found = os.stat(file)  # noqa: PTH116 - of a descriptor too
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def of_named(cls, file: Path) -> FileState:
        """The state of a file that was verified before.

        Raises:
            ChangedFileError: If it is not there.
        """
        try:
            return cls.of(file)
        except OSError as error:
            raise changed_file(file) from error

    def require(self, file: Path) -> None:
        """Require that a file is in this state.

        Raises:
            ChangedFileError: If it is not, or is not there.
        """
        self.require_same(self.of_named(file), file)

    def require_same(self, now: FileState, file: Path) -> None:
        """Require that another state is this one.

        Args:
            now: The other state.
            file: Whose state it is, for the error.

        Raises:
            TouchedFileError: If the change time alone is another.
            ChangedFileError: If anything else is.
        """
        if now != self:
            touched = replace(now, changed=self.changed) == self
            raise changed_file(file, TouchedFileError if touched else ChangedFileError)


class TouchedFileError(ChangedFileError):
    """A file has another change time and is the same otherwise.

    A hard link or another mode does that, which leaves the content alone. So does a program that writes to the file and
    sets its modification time back, and nothing tells the two apart but looking at the content again.
    """


def changed_file(file: Path, error: type[ChangedFileError] = ChangedFileError) -> ChangedFileError:
    """The error for a file that is not what was verified."""
    return error(
        f"{file} changed after it was verified, and nothing is opened from it.",
        hint="Restart to verify and use the files that are there now.",
    )


def when_steady(attempt: Callable[[], _T], times: int = 5) -> _T:
    """Try to verify and open files, and try again if one of them was touched during the attempt.

    Args:
        attempt: Verifies and opens the files from scratch on each call.
        times: The largest number of attempts.

    Returns:
        What the attempt returns.

    Raises:
        ChangedFileError: If a file changed, or was touched during every attempt.
    """
    for _ in range(times - 1):
        with suppress(TouchedFileError):
            return attempt()
    return attempt()


class MemoryFile:
    """Bytes in an anonymous file (memfd) that the kernel lets no process change, not even this one.

    No path on disk leads to it, so it cannot be replaced, rewritten or truncated. It counts as memory of the process
    that made it, and is gone with the last object or mapping that uses it. Code that opens files by their path can open
    it, in this process and in a child that inherits the descriptor.

    Args:
        fd: The descriptor of a sealed file; it belongs to this object from then on.
        digest: What identifies its content.

    Attributes:
        fd: The descriptor.
        digest: What identifies its content.
        path: Where any code of a process that has the descriptor can open it.

    Raises:
        ValueError: If the file could still change.
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
        """A new one.

        Args:
            name: What it is called in /proc, for people only.
            size: Its bytes.
            fill: Writes all of them, in any order, and returns the digest.

        Raises:
            ConfigurationError: If there is no memory for it, or the system has no such files.
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
        """The one behind a descriptor that a parent process left open; processes started later do not get it.

        Raises:
            ValueError: If it is not a sealed memory file.
            OSError: If there is no such descriptor.
        """
        os.set_inheritable(fd, False)
        return cls(fd, digest)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a memory file cannot be pickled; another process gets it by its descriptor")
