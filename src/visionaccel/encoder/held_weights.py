"""Copies of the weights in memory, for every session that opens now or later.

A fallback, a reference and a device's restarted process open when they are first needed. By then other files may lie at
the checkpoint's path, and a mapped file can be rewritten or cut short at any time.
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
"""Memory files that are in use, by what they hold: one process needs one copy of the same files."""


def hold_source(source: Tower | Bundle, weights: WantedWeights = "private") -> Tower | Bundle:
    """The same tower or bundle over a copy of its weights in memory; itself if they are `mapped` or a copy already.

    Raises:
        SettingsError: If `weights` is neither.
        ChangedFileError: If the files changed since their headers were read, or the weights of a bundle over an
            external checkpoint do not have the digest that it states.
        CheckpointError: If they cannot be read.
        ConfigurationError: If there is no memory for a copy.
    """
    if weights not in get_args(WantedWeights):
        known = ", ".join(get_args(WantedWeights))
        raise SettingsError(f"weights cannot be {weights!r}.", hint=f"Name one of: {known}.")
    found = source.tower.weights
    if weights == "mapped" or all(isinstance(tensor.origin, MemoryFile) for tensor in found.values()):
        return source
    try:
        copies, memory = _copied(found)
    except TouchedFileError:
        copies, memory = when_steady(lambda: _copied(_found_again(source)))
    digest = memory.digest
    if isinstance(source, Bundle) and source.manifest.checkpoint is not None:
        digest = source.manifest.weights_digest
    if memory.digest != digest:
        raise ChangedFileError(
            f"the vision weights in {source.tower.weights_folder} have the digest {memory.digest}, and {digest} is "
            "needed.",
            hint="Bring back the checkpoint that the encoder was made from.",
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
    """The same tensors in the files as they are now; a bundle that holds them is verified again."""
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
    """Whether a stored tensor has these rows: a weight may be a part of one that is stored fused with others."""
    rows = (whole.dtype, whole.shape[1:]) == (part.dtype, part.shape[1:])
    return rows and whole.offset <= part.offset and part.offset + part.length <= whole.offset + whole.length
