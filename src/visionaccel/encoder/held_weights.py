"""Copies of the weights in memory, for every session that opens now or later.

A fallback, a reference and a device's restarted process open when they are first needed. By then the checkpoint's path
may hold different files, and a mapped file can be rewritten or truncated at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, TypeAlias, get_args
from weakref import WeakValueDictionary

from visionaccel.bundle import MANIFEST, Bundle, open_bundle
from visionaccel.checkpoint import copy_to_memory, read_header
from visionaccel.core.memory_files import FileState, MemoryFile, TouchedFileError, changed_file, when_steady
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import ChangedFileError, SettingsError
from visionaccel.families import Tower

WantedWeights: TypeAlias = Literal["private", "mapped"]
"""Where sessions read the weights: in a private copy in memory, or in the files, whose memory processes share."""

_copies: WeakValueDictionary[object, MemoryFile] = WeakValueDictionary()
"""Memory files in use, by what they hold: a process needs only one copy of the same weights."""


def hold_source(source: Tower | Bundle, weights: WantedWeights = "private") -> Tower | Bundle:
    """Return the tower or bundle over a copy of its weights in memory; unchanged if they are `mapped` or a copy.

    Raises:
        SettingsError: If `weights` is neither.
        ChangedFileError: If the files changed since their headers were read, or the weights of a bundle over an
            external checkpoint do not have the manifest's digest.
        CheckpointError: If they cannot be read.
        ConfigurationError: If there is not enough memory for a copy.
    """
    if weights not in get_args(WantedWeights):
        raise SettingsError(f"unknown weights {weights!r}.", hint="Choose private or mapped.")
    found = source.tower.weights
    if weights == "mapped" or all(isinstance(tensor.origin, MemoryFile) for tensor in found.values()):
        return source
    try:
        copies, memory = _copied(found)
    except TouchedFileError:
        copies, memory = when_steady(lambda: _copied(_found_again(source)))
    manifest = source.manifest if isinstance(source, Bundle) else None
    if manifest is not None and manifest.checkpoint is not None and memory.digest != manifest.weights_digest:
        raise ChangedFileError(
            f"the vision weights in {source.tower.weights_folder} have the digest {memory.digest}, but the bundle "
            f"needs {manifest.weights_digest}.",
            hint="Restore the checkpoint that the bundle was made from.",
        )
    return source.over(copies)


def _copied(weights: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], MemoryFile]:
    key = tuple((name, each.file, each.offset, each.origin) for name, each in sorted(weights.items()))
    known = _copies.get(key)
    copies = copy_to_memory(weights, known)
    memory = next(each.origin for each in copies.values() if isinstance(each.origin, MemoryFile))
    if known is None:
        for file, state in {each.file: each.origin for each in weights.values()}.items():
            if isinstance(state, FileState):
                state.require(file)
        _copies[key] = memory
    return copies, memory


def _found_again(source: Tower | Bundle) -> Mapping[str, StoredTensor]:
    """Return the same tensors in the files as they are now; a bundle that contains them is verified again."""
    if isinstance(source, Bundle) and source.manifest.checkpoint is None:
        bundle = open_bundle(source.folder)
        if bundle.manifest != source.manifest:
            raise changed_file(source.folder / MANIFEST)
        return bundle.tower.weights
    weights = source.tower.weights
    headers = {file: read_header(file)[0] for file in {tensor.file for tensor in weights.values()}}
    again = {}
    for name, each in weights.items():
        whole = headers[each.file].get(each.name)
        if whole is None or not _holds(whole, each):
            raise changed_file(each.file)
        again[name] = replace(each, origin=whole.origin)
    return again


def _holds(whole: StoredTensor, part: StoredTensor) -> bool:
    """Return whether a stored tensor has a part's rows: a weight may be stored fused with others."""
    rows = (whole.dtype, whole.shape[1:]) == (part.dtype, part.shape[1:])
    return rows and whole.offset <= part.offset and part.offset + part.length <= whole.offset + whole.length
