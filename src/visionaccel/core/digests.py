"""Digests of files, remembered while the files stay unchanged.

A digest is taken from memory if the file has the same device, inode, size, modification and change time as when it was
computed. Change times cannot be set by programs, so this sees every write; what it cannot see is a disk that rots, for
which a full check is there.
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

__all__ = ["file_digest", "json_digest", "remembered_digest"]

_MOST_ENTRIES = 4096
_SETTLED_SECONDS = 2.0
"""A file that changed less than this ago may change again within the resolution of its times."""


def file_digest(path: Path, *, trust_unchanged: bool = True) -> str:
    """`sha256:` and the hexadecimal SHA-256 of a file.

    Raises:
        BundleError: If it cannot be read.
    """

    def compute() -> str:
        try:
            with path.open("rb") as file:
                return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error}", hint="Fetch the bundle again.") from error

    return remembered_digest("file", [path], compute, trust_unchanged=trust_unchanged)


def json_digest(document: Mapping[str, Any]) -> str:
    """`sha256:` and the hexadecimal SHA-256 of a document as JSON, independent of its layout and the order of names."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def remembered_digest(
    kind: str, files: Sequence[Path], compute: Callable[[], str], *, trust_unchanged: bool = True
) -> str:
    """A digest of some files, from memory if none of them changed.

    Args:
        kind: What the digest is of; part of the key.
        files: The files that it depends on.
        compute: Computes it.
        trust_unchanged: Whether memory may answer.
    """
    # From before the state was read: what was written just then may have been overwritten without its times changing.
    started = time.time_ns()
    try:
        state = _states(files)
    except OSError:
        return compute()
    key = json.dumps([kind, *sorted(map(str, files))])
    known = _load()
    entry = known.get(key)
    if trust_unchanged and isinstance(entry, dict) and entry.get("state") == state:
        remembered = entry.get("digest")
        if isinstance(remembered, str):
            return remembered
    digest = compute()
    settled = all(started - times[-1] > _SETTLED_SECONDS * 1e9 for times in state)
    with suppress(OSError):
        if settled and _states(files) == state:
            _store({**known, key: {"state": state, "digest": digest}})
    return digest


def _states(files: Sequence[Path]) -> list[list[int]]:
    """The state of each file in the order of their names, as JSON has it.

    Raises:
        OSError: If one is not there.
    """
    return [list(astuple(FileState.of(file))) for file in sorted(files)]


def _memory() -> Path:
    return our_cache() / "digests.json"


def _load() -> dict[str, Any]:
    try:
        known = json.loads(read_bounded(_memory()))
    except (OSError, ValueError, RecursionError, RuntimeError):  # RuntimeError: there is no home folder.
        return {}
    return known if isinstance(known, dict) else {}


def _store(known: dict[str, Any]) -> None:
    with suppress(OSError, RuntimeError):  # Memory is a convenience; a read-only home must not cost a start.
        target = _memory()
        target.parent.mkdir(parents=True, exist_ok=True)
        kept = dict(list(known.items())[-_MOST_ENTRIES:])
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as file:
            json.dump(kept, file)
        Path(file.name).replace(target)
