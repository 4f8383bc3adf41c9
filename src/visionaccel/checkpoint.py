"""Reading Hugging Face checkpoint folders: configuration and where each tensor's bytes lie. No weight is read here.

The safetensors layout is eight bytes of header length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format). The safetensors library does not tell a tensor's offset in its
file, which external data in an ONNX graph needs, so the header is parsed here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from visionaccel.bounded_files import MOST_JSON_BYTES, open_regular, read_bounded
from visionaccel.errors import CheckpointError

__all__ = [
    "INDEX_FILE",
    "ITEM_BYTES",
    "SINGLE_FILE",
    "Checkpoint",
    "StoredTensor",
    "locate_checkpoint",
    "read_header",
    "read_json",
    "safetensors_dtype",
]

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of an element by safetensors' name of its dtype; of others, only a tensor's own number of bytes is known."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {plain: name for name, plain in _DTYPES.items()}
_MOST_DIMENSIONS = 64
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes lie, little-endian and C-contiguous.

    Attributes:
        file: The shard, with symbolic links resolved.
        offset: First byte in the file.
        length: Number of bytes.
        dtype: `float32`, `bfloat16`, ... or safetensors' own name where it is not a float.
        shape: The tensor's shape.
    """

    name: str
    file: Path
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """A checkpoint folder with `config.json` and safetensors weights, in one file or in shards with an index.

    Args:
        folder: The folder. Files may be symbolic links, as in the Hugging Face cache.

    Raises:
        CheckpointError: If the folder or its configuration is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder.", hint="Pass the folder that holds config.json.")
        self.config: Mapping[str, Any] = read_json(self.folder / "config.json")

    @property
    def architectures(self) -> tuple[str, ...]:
        """The model classes that the configuration names."""
        named = self.config.get("architectures")
        return tuple(map(str, named)) if isinstance(named, list) else ()

    @cached_property
    def weight_map(self) -> Mapping[str, str] | None:
        """The index: name of the shard by name of tensor. None for weights in a single file, which needs no index.

        Raises:
            CheckpointError: If there are neither, or the index is malformed.
        """
        index = self.folder / INDEX_FILE
        if (self.folder / SINGLE_FILE).exists():
            return None
        if not index.exists():
            raise CheckpointError(
                f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}.",
                hint="Download the checkpoint's safetensors files; other weight formats are not read.",
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map.", hint="Download the file again.")
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(
                    f"{index} names a shard outside its folder: {shard!r}.", hint="Do not use this checkpoint."
                )
        return weight_map

    @property
    def shards(self) -> tuple[str, ...]:
        """The names of the files that hold the weights.

        Raises:
            CheckpointError: As `weight_map`.
        """
        return (SINGLE_FILE,) if self.weight_map is None else tuple(sorted(set(self.weight_map.values())))

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of every shard by name.

        Raises:
            CheckpointError: If a shard is missing, truncated or inconsistent with its header or the index.
        """
        found: dict[str, StoredTensor] = {}
        for shard in self.shards:
            found |= read_header(self.folder / shard)[0]
        missing = sorted(set(self.weight_map or ()) - set(found))
        if missing:
            raise CheckpointError(
                f"{self.folder / INDEX_FILE} lists {len(missing)} tensors that no shard holds, such as {missing[0]!r}.",
                hint="Download the checkpoint again; index and shards are of different revisions.",
            )
        return found

    @cached_property
    def weights_folder(self) -> Path:
        """The deepest folder that holds every shard, symbolic links resolved: the base of external-data locations."""
        files = {tensor.file for tensor in self.tensors.values()}
        return Path(os.path.commonpath([file.parent for file in files]))

    def with_prefix(self, prefixes: tuple[str, ...]) -> dict[str, StoredTensor]:
        """Tensors whose name starts with one of `prefixes`, keyed by the rest of the name; the first match counts."""
        found: dict[str, StoredTensor] = {}
        for name, tensor in self.tensors.items():
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            if prefix is not None:
                found[name.removeprefix(prefix)] = tensor
        return found


def locate_checkpoint(source: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, or of a repository on the Hugging Face Hub (from the local cache where it is there).

    Raises:
        CheckpointError: If neither a folder nor a repository of that name can be had.
    """
    if Path(source).is_dir():
        return Checkpoint(Path(source))
    if Path(source).is_absolute():
        raise CheckpointError(f"{os.fspath(source)} is not a folder.", hint="Pass a local checkpoint folder.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = ["*.safetensors", "*.json"]
        folder = snapshot_download(os.fspath(source), revision=revision, allow_patterns=patterns)
    except (OSError, ValueError, HFValidationError) as error:
        raise CheckpointError(
            f"{os.fspath(source)!r} is neither a folder nor a repository that could be had: {error}",
            hint="Pass a local checkpoint folder, or check the name and the network.",
        ) from error
    return Checkpoint(Path(folder))


def safetensors_dtype(dtype: str) -> str:
    """The name safetensors gives a `StoredTensor.dtype`, such as `BF16` of `bfloat16`."""
    return _NAMES.get(dtype, dtype)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in one of a checkpoint's files.

    Raises:
        CheckpointError: If the file is missing or unreadable, or holds something else.
    """
    try:
        value = json.loads(read_bounded(path).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.", hint="Pass a complete checkpoint folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="Download the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.", hint="Download the file again.")
    return value


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """What one safetensors file says it holds: its tensors by name, and its `__metadata__`, empty if it has none.

    Raises:
        CheckpointError: If the file is missing, or any tensor disagrees with the file's real size.
    """
    again = "The file is truncated or damaged; download it again."
    try:
        resolved = path.resolve(strict=True)
        with open_regular(resolved) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if start + file.read(len(_LFS_POINTER) - 8) == _LFS_POINTER:
                raise CheckpointError(f"{path} is a Git LFS pointer, not weights.", hint="Run `git lfs pull` there.")
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= size - 8:
                raise CheckpointError(f"{path} ({size} bytes) has no complete safetensors header.", hint=again)
            if length > MOST_JSON_BYTES:
                raise CheckpointError(
                    f"{path} states a safetensors header of {length} bytes, and {MOST_JSON_BYTES} are read at most.",
                    hint="Keep the weights in several files, with an index.",
                )
            file.seek(8)
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.", hint="Download the missing shard.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}", hint=again) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object.", hint=again)
    metadata = header.pop("__metadata__", None)
    tensors = {name: _stored(path, resolved, size, 8 + length, name, entry) for name, entry in header.items()}
    return tensors, {key: str(text) for key, text in metadata.items()} if isinstance(metadata, dict) else {}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("no number of bytes or elements")
    return value


def _stored(path: Path, resolved: Path, size: int, base: int, name: str, entry: Any) -> StoredTensor:
    try:
        begin, end = map(_count, entry["data_offsets"])
        if len(entry["shape"]) > _MOST_DIMENSIONS:  # the product of very many sizes alone takes minutes
            raise ValueError("a tensor of too many dimensions")
        shape, dtype = tuple(map(_count, entry["shape"])), str(entry["dtype"])
        expected = math.prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else end - begin
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header entry of {name!r} is malformed.", hint="Download the file again."
        ) from error
    if not 0 <= begin <= end or end - begin != expected or base + end > size:
        raise CheckpointError(
            f"{path}: tensor {name!r} should end at byte {base + end}, but the file has {size}."
            if base + end > size
            else f"{path}: tensor {name!r} of {dtype}{list(shape)} does not fit its {end - begin} bytes.",
            hint="The file is truncated or damaged; download it again.",
        )
    return StoredTensor(name, resolved, base + begin, end - begin, _DTYPES.get(dtype, dtype), shape)
