"""Reads Hugging Face checkpoint folders: the configuration, and where each tensor's bytes are.

A safetensors file has eight bytes of header length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format). The safetensors library does not return a tensor's offset in its
file, which external data in an ONNX graph needs, so the header is parsed here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from visionaccel.core.bounded_files import MOST_JSON_BYTES, open_regular, parse_json, read_bounded
from visionaccel.core.dtypes import FLOATS, OF_SAFETENSORS
from visionaccel.core.memory_files import FileState
from visionaccel.core.stored_tensor import StoredTensor
from visionaccel.errors import CheckpointError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_OTHER_FILES = ("adapter_model", "consolidated")
"""Prefixes of names of safetensors files that contain an adapter, or the weights in a different layout."""

_MOST_DIMENSIONS = 64
_AGAIN = "The file is truncated or damaged; download it again."
_LFS_POINTER = b"version https://git-lfs"


class Checkpoint:
    """A checkpoint folder with `config.json` and safetensors weights. Its files are read when they are first needed.

    Args:
        folder: The folder. Files may be symbolic links, as in the Hugging Face cache.
        files: The files with the weights, in any folder, if another program chose them: no others are read. Default:
            the shards that the index names; without an index, every safetensors file in the folder.

    Raises:
        CheckpointError: If a file is missing, unreadable, truncated or inconsistent with its header, if there are no
            weights, or if the names, dtypes or shapes in an index and in a single file next to it differ.
    """

    def __init__(self, folder: Path, *, files: Iterable[Path] | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder.", hint="Pass the folder that contains config.json.")
        self.config: Mapping[str, Any] = read_json(self.folder / "config.json")
        self._given = None if files is None else tuple(map(Path, files))

    @property
    def architectures(self) -> tuple[str, ...]:
        """The model classes that the configuration lists."""
        listed = self.config.get("architectures")
        return tuple(map(str, listed)) if isinstance(listed, list) else ()

    @cached_property
    def weight_map(self) -> Mapping[str, str] | None:
        """The index: name of the shard by name of tensor. None without an index, and if the files were given."""
        index = self.folder / INDEX_FILE
        if self._given is not None or not index.exists():
            return None
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map.", hint="Download the file again.")
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(
                    f"{index} refers to a shard outside its folder: {shard!r}.", hint="Do not use this checkpoint."
                )
        return weight_map

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files with the weights."""
        if self._given is not None:
            return self._given
        if self.weight_map is None:
            found = [path for path in self.folder.glob("*.safetensors") if not path.name.startswith(_OTHER_FILES)]
            if not found:
                raise CheckpointError(
                    f"{self.folder} has neither {INDEX_FILE} nor weights in *.safetensors files.",
                    hint="Download the checkpoint's safetensors files; other formats are not supported.",
                )
            return tuple(sorted(found))
        return tuple(self.folder / shard for shard in sorted(set(self.weight_map.values())))

    @cached_property
    def second_copy(self) -> Mapping[str, StoredTensor]:
        """The tensors of a `model.safetensors` that is not in the index; some programs read it instead."""
        single = self.folder / SINGLE_FILE
        apart = self.weight_map is not None and SINGLE_FILE not in self.weight_map.values() and single.exists()
        return read_header(single)[0] if apart else {}

    @cached_property
    def headers(self) -> Mapping[Path, tuple[Mapping[str, StoredTensor], Mapping[str, str]]]:
        """The result of `read_header` for each of `files`."""
        return {file: read_header(file) for file in self.files}

    @cached_property
    def _every_tensor(self) -> tuple[StoredTensor, ...]:
        """All tensors of all files, in the order of the files; a name may occur twice."""
        found = tuple(tensor for tensors, _ in self.headers.values() for tensor in tensors.values())
        kinds, others = ({(t.name, t.dtype, t.shape) for t in each} for each in (found, self.second_copy.values()))
        if others and others != kinds:
            raise CheckpointError(
                f"{self.folder} has both {SINGLE_FILE} and {INDEX_FILE}, but their tensors differ.",
                hint="Remove the one that is out of date.",
            )
        return found

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name; if several files have one, that of the last file."""
        return {tensor.name: tensor for tensor in self._every_tensor}

    def with_prefix(self, prefixes: tuple[str, ...]) -> dict[str, StoredTensor]:
        """Return the tensors whose name starts with one of `prefixes`, by the rest of the name.

        Raises:
            CheckpointError: If the index lists one that no file has, or one is stored twice, in two files or with two
                prefixes, with different values.
        """
        found: dict[str, StoredTensor] = {}
        for tensor in (*self._every_tensor, *self.second_copy.values()):
            prefix = next((p for p in prefixes if tensor.name.startswith(p)), None)
            if prefix is None:
                continue
            other = found.setdefault(tensor.name.removeprefix(prefix), tensor)
            if not other.holds_the_same_as(tensor):
                raise CheckpointError(
                    f"{other.name!r} in {other.file} and {tensor.name!r} in {tensor.file} are the same weight with "
                    "different values.",
                    hint="Remove the file that is out of date.",
                )
        missing = sorted(n for n in self.weight_map or () if n.startswith(prefixes) and n not in self.tensors)
        if missing:
            raise CheckpointError(
                f"{self.folder / INDEX_FILE} lists {len(missing)} vision tensors that no shard contains, such as "
                f"{missing[0]!r}.",
                hint="Download the checkpoint again: index and shards are from different revisions.",
            )
        return found


def locate_checkpoint(
    source: str | os.PathLike[str], revision: str | None = None, *, download: bool = True
) -> Checkpoint:
    """Return the checkpoint in a folder, or of a repository on the Hugging Face Hub.

    A repository is taken from the hub's local cache if possible; without `download`, the hub is not contacted.

    Raises:
        CheckpointError: If no folder and no repository has that name.
    """
    if Path(source).is_dir() or Path(source).is_absolute():
        return Checkpoint(Path(source))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(
            os.fspath(source),
            revision=revision,
            allow_patterns=["*.safetensors", "*.json", "*.jinja"],
            ignore_patterns=["*/*", *(f"{start}*.safetensors" for start in _OTHER_FILES)],
            local_files_only=not download,
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise CheckpointError(
            f"{os.fspath(source)!r} is neither a folder nor a repository "
            + (f"that can be downloaded: {error}" if download else "in the Hugging Face cache of this machine."),
            hint="Pass a local checkpoint folder, or check the name and the network.",
        ) from error
    return Checkpoint(Path(folder))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's file; CheckpointError if it is missing, unreadable or not an object."""
    try:
        value = json.loads(read_bounded(path).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.", hint="Pass a complete checkpoint folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="Download the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object.", hint="Download the file again.")
    return value


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the tensors of a safetensors file by name, and its `__metadata__`, which may be empty.

    Raises:
        CheckpointError: If the file is missing or damaged, or two of its tensors overlap or have the same name.
    """
    try:
        resolved = path.resolve(strict=True)
        with open_regular(resolved) as file:
            state = FileState.of(file.fileno())
            start = file.read(8)
            if start + file.read(len(_LFS_POINTER) - 8) == _LFS_POINTER:
                raise CheckpointError(f"{path} is a Git LFS pointer, not weights.", hint="Run `git lfs pull` there.")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= state.size - 8:
                raise CheckpointError(f"{path} ({state.size} bytes) has no complete safetensors header.", hint=_AGAIN)
            if length > MOST_JSON_BYTES:
                raise CheckpointError(
                    f"{path} has a safetensors header of {length} bytes; at most {MOST_JSON_BYTES} are supported.",
                    hint="Split the weights into several files with an index.",
                )
            file.seek(8)
            header = parse_json(file.read(length).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.", hint="Download the missing shard.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}", hint=_AGAIN) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object.", hint=_AGAIN)
    metadata = header.pop("__metadata__", None)
    tensors = {name: _stored(path, resolved, state, 8 + length, name, entry) for name, entry in header.items()}
    filled = sorted((tensor.offset, tensor.offset + tensor.length, name) for name, tensor in tensors.items())
    for (_, end, one), (begin, _, other) in pairwise(each for each in filled if each[0] < each[1]):
        if begin < end:
            raise CheckpointError(f"{path}: tensors {one!r} and {other!r} overlap.", hint=_AGAIN)
    return tensors, {key: str(text) for key, text in metadata.items()} if isinstance(metadata, dict) else {}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("not a number of bytes or elements")
    return value


def _stored(path: Path, resolved: Path, state: FileState, base: int, name: str, entry: Any) -> StoredTensor:
    try:
        begin, end = map(_count, entry["data_offsets"])
        if len(entry["shape"]) > _MOST_DIMENSIONS:  # the product of very many sizes alone takes minutes
            raise ValueError("a tensor of too many dimensions")
        shape, dtype = tuple(map(_count, entry["shape"])), str(entry["dtype"])
        known = OF_SAFETENSORS.get(dtype)
        expected = end - begin if known is None else math.prod(shape) * known.bytes
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header entry of {name!r} is malformed.", hint="Download the file again."
        ) from error
    if (last := base + end) > state.size:
        raise CheckpointError(
            f"{path}: {name!r} should end at byte {last}, but the file has {state.size} bytes.", hint=_AGAIN
        )
    if begin > end or end - begin != expected:
        found = f"{dtype}{list(shape)} does not fit its {end - begin} bytes"
        raise CheckpointError(f"{path}: tensor {name!r} has inconsistent sizes: {found}.", hint=_AGAIN)
    plain = known.name if known is not None and known.name in FLOATS else dtype
    return StoredTensor(name, resolved, base + begin, end - begin, plain, shape, state)
