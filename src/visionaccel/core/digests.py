"""Digests of files, remembered while the files stay unchanged.

A digest is not computed again if the file has the same device, inode, size, modification and change time as before.
Programs cannot set change times, so every write is noticed. Corruption on disk is not; a full check finds it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

from visionaccel.core.bounded_files import read_bounded
from visionaccel.core.cache_folder import our_cache
from visionaccel.core.memory_files import FileState
from visionaccel.errors import BundleError

_MOST_ENTRIES = 4096
_SETTLED_SECONDS = 2.0
"""A file that changed less than this ago may change again within the resolution of its times."""


def file_digest(path: Path, *, trust_unchanged: bool = True) -> str:
    """Return `sha256:` and the hexadecimal SHA-256 of a file; BundleError if it cannot be read."""

    def compute() -> str:
        try:
            with path.open("rb") as file:
                return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}", hint="Fetch the bundle again.") from error

    return remembered_digest("file", [path], compute, trust_unchanged=trust_unchanged)


def json_digest(document: Mapping[str, Any]) -> str:
    """Return `sha256:` and the hexadecimal SHA-256 of a JSON document in canonical form."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def remembered_digest(
    kind: str, files: Sequence[Path], compute: Callable[[], str], *, trust_unchanged: bool = True
) -> str:
    """Return the digest of some files: the remembered one if `trust_unchanged` and no file changed, else `compute()`.

    `kind` tells apart different digests of the same files.
    """
    # Before the state is read: a file that was only just written may be written again without new times.
    started = time.time_ns()
    try:
        state, memory = _states(files), our_cache() / "digests.json"
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return compute()
    key = json.dumps([kind, *sorted(map(str, files))])
    known = _load(memory)
    match known.get(key):
        case {"state": remembered, "digest": str(digest)} if trust_unchanged and remembered == state:
            return digest
    digest = compute()
    settled = all(started - times[-1] > _SETTLED_SECONDS * 1e9 for times in state)
    with suppress(OSError):
        if settled and _states(files) == state:
            entries = {**known, key: {"state": state, "digest": digest}}.items()
            _store(memory, dict(list(entries)[-_MOST_ENTRIES:]))
    return digest


def _states(files: Sequence[Path]) -> list[list[int]]:
    """Return the state of each file as a list, sorted by file name; OSError if a file is missing."""
    return [list(astuple(FileState.of(file))) for file in sorted(files)]


def _load(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(read_bounded(memory))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _store(memory: Path, known: Mapping[str, Any]) -> None:
    """Replace the memory file. Raises OSError, such as for a read-only home, which the caller ignores."""
    memory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False, encoding="utf-8") as file:
        json.dump(known, file)
    Path(file.name).replace(memory)
