"""A private folder that the processes of one server share, for what vLLM has no channel for."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["board", "make_board"]

_FOLDER = "_VISIONACCEL_BOARD"


def make_board(*, inherit: bool = False) -> None:
    """Name a new folder, readable by this user only, to the child processes; removed when this process exits.

    Args:
        inherit: Use one that this process inherited, as where several API servers ask the same engines. Otherwise such
            a folder belongs to another engine's launcher, which may end first.
    """
    owner, _, _ = os.environ.get(_FOLDER, "").partition(":")
    if owner != str(os.getpid()) and not (inherit and owner):
        folder = tempfile.mkdtemp(prefix="visionaccel-")
        os.environ[_FOLDER] = f"{os.getpid()}:{folder}"
        atexit.register(_remove, folder, os.getpid())


def board() -> Path | None:
    """The folder; None where none was made."""
    _, _, folder = os.environ.get(_FOLDER, "").partition(":")
    return Path(folder) if folder else None


def _remove(folder: str, owner: int) -> None:
    # A forked child inherits the exit handler but must not take the folder from its parent.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
