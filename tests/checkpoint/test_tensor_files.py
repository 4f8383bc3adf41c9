"""Streamed digests, copies and conversions of tensors, with safetensors and torch as the oracles."""

import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import load_file, save_file

from visionaccel.checkpoint import Checkpoint, read_header, weights_digest, write_safetensors
from visionaccel.checkpoint import tensors as tensor_files
from visionaccel.errors import ChangedFileError, CheckpointError, ConfigurationError
from visionaccel_testing.checkpoints import random_checkpoint

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TARGETS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OTHERS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
)  # fmt: skip

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
tensor_kinds = st.tuples(st.sampled_from(FLOATS + OTHERS), shapes, st.integers(0, 2**32))
named_kinds = st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), tensor_kinds, max_size=6)


def draw(dtype, shape, seed):
    """A tensor of random bits: NaN, infinities and subnormal numbers included."""
    size = torch.Size(shape).numel() * dtype.itemsize
    most = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, most, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def contents(path):
    """Raw bytes, dtype and shape of each tensor, as the safetensors library reads them."""
    return {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in deserialize(path)}


def save(tensors, path):
    save_file(tensors, path)
    return read_header(path)[0]


def converted(tensors, path, dtype):
    write_safetensors(path, tensors, dtype=dtype)
    return load_file(path)


def same(ours, theirs):
    """Equal bits; NaN equals NaN, whose bits differ between libraries."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    bits = {2: torch.int16, 4: torch.int32}[ours.dtype.itemsize]
    both_nan = ours.isnan() & theirs.isnan()
    assert torch.equal(ours.view(bits)[~both_nan], theirs.view(bits)[~both_nan])


@given(kinds=named_kinds, chunk=st.sampled_from([8, 40, 1 << 20]))
def test_a_copy_has_the_same_tensors_aligned_and_is_valid_safetensors(tmp_path_factory, kinds, chunk):
    folder = tmp_path_factory.mktemp("copy")
    tensors = {name: draw(*kind) for name, kind in kinds.items()}
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    stored = {}
    for number, part in enumerate(parts):
        stored |= save(part, folder / f"{number}.safetensors")
    read = []
    with mock.patch.object(tensor_files, "CHUNK_BYTES", chunk):
        write_safetensors(folder / "copy", stored, metadata={"format": "pt"}, progress=read.append)
    expected = contents((folder / "0.safetensors").read_bytes()) | contents((folder / "1.safetensors").read_bytes())
    assert contents((folder / "copy").read_bytes()) == expected
    assert sum(read) == sum(tensor.length for tensor in stored.values())
    copied, metadata = read_header(folder / "copy")
    assert metadata == {"format": "pt"}
    assert all(entry.offset % tensors[name].dtype.itemsize == 0 for name, entry in copied.items())
    for name, tensor in load_file(folder / "copy").items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8))


def test_dtypes_below_a_byte_are_copied_behind_the_others(tmp_path):
    """Six numbers of four bits; torch cannot save them, and the safetensors library accepts them."""
    entries = {
        "a": {"dtype": "F4", "shape": [6], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [3, 7]},
    }
    header = json.dumps(entries).encode()
    (tmp_path / "source").write_bytes(len(header).to_bytes(8, "little") + header + b"abcdefg")
    stored = read_header(tmp_path / "source")[0]
    write_safetensors(tmp_path / "copy", stored, dtype="float32")
    copied = (tmp_path / "copy").read_bytes()
    assert contents(copied) == {"a": ("F4", [6], b"abc"), "b": ("F32", [1], b"defg")}
    assert read_header(tmp_path / "copy")[0]["b"].offset % 4 == 0


def test_tensors_get_the_names_they_are_given(tmp_path):
    stored = save({"visual.a": torch.arange(5), "visual.b": torch.ones(3)}, tmp_path / "source")
    write_safetensors(tmp_path / "copy", {name.removeprefix("visual."): entry for name, entry in stored.items()})
    with safe_open(tmp_path / "copy", "numpy") as file:
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118 - it has no iterator
            "a": [0, 1, 2, 3, 4],
            "b": [1, 1, 1],
        }
        assert file.metadata() is None


@pytest.mark.parametrize("target", TARGETS)
@given(dtype=st.sampled_from(FLOATS), shape=shapes, seed=st.integers(0, 2**32), chunk=st.sampled_from([8, 40, 1 << 20]))
def test_conversion_is_torchs(tmp_path_factory, target, dtype, shape, seed, chunk):
    folder = tmp_path_factory.mktemp("conversion")
    tensor = draw(dtype, shape, seed)
    expected = tensor.to(TARGETS[target])
    tensor = torch.where(tensor.isfinite() & expected.isinf(), torch.zeros((), dtype=dtype), tensor)
    stored = save({"x": tensor}, folder / "source")
    with mock.patch.object(tensor_files, "CHUNK_BYTES", chunk):
        same(converted(stored, folder / "copy", target)["x"], tensor.to(TARGETS[target]))


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_converts_as_by_torch(tmp_path, dtype, target):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    fits = ~(every.isfinite() & every.to(TARGETS[target]).isinf())
    stored = save({"x": every[fits].contiguous()}, tmp_path / "source")
    same(converted(stored, tmp_path / "copy", target)["x"], every[fits].to(TARGETS[target]))


@pytest.mark.parametrize(("target", "lost_bits"), [("bfloat16", 16), ("float16", 13)])
def test_ties_go_to_even(tmp_path, target, lost_bits):
    """Each representable number that fits, and what lies half-way to the next, just below that and just above."""
    half = 1 << (lost_bits - 1)
    kept = torch.arange(1 << (32 - lost_bits), dtype=torch.int64) << lost_bits
    bits = (kept[:, None] + torch.tensor([0, half - 1, half, half + 1])).reshape(-1)
    values = bits.to(torch.uint32).view(torch.float32)
    values = values[~(values.isfinite() & values.to(TARGETS[target]).isinf())].contiguous()
    stored = save({"x": values}, tmp_path / "source")
    same(converted(stored, tmp_path / "copy", target)["x"], values.to(TARGETS[target]))


@pytest.mark.parametrize(("target", "bits"), [("bfloat16", 8), ("float16", 11)])
def test_float64_goes_by_way_of_float32(tmp_path, target, bits):
    """Just above half-way to the next number: float32 makes it half-way, and that goes to even."""
    tensor = torch.tensor([1 + 2**-bits + 2**-40], dtype=torch.float64)
    copy = converted(save({"x": tensor}, tmp_path / "source"), tmp_path / "copy", target)["x"]
    same(copy, tensor.to(TARGETS[target]))
    assert copy.item() == 1


@pytest.mark.parametrize("dtype", OTHERS)
def test_what_is_no_plain_float_is_not_converted(tmp_path, dtype):
    stored = save({"x": draw(dtype, (3, 5), 0), "w": torch.ones(2)}, tmp_path / "source")
    write_safetensors(tmp_path / "copy", stored, dtype="bfloat16")
    before, after = (contents((tmp_path / file).read_bytes()) for file in ("source", "copy"))
    assert after["x"] == before["x"]
    assert after["w"][0] == "BF16"


@pytest.mark.parametrize(
    ("value", "dtype", "target"),
    [
        (65520.0, torch.float32, "float16"),
        (-1e30, torch.bfloat16, "float16"),
        (3.4e38, torch.float32, "bfloat16"),
        (1e300, torch.float64, "float32"),
    ],
)
def test_a_number_that_would_become_infinite_is_refused(tmp_path, value, dtype, target):
    weight = torch.zeros(400_000, dtype=dtype)
    weight[-1] = value
    stored = save({"blocks.0.weight": weight, "other": torch.ones(3)}, tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.weight' in .*source contains .*, infinite in " + target):
        write_safetensors(tmp_path / "copy", stored, dtype=target)
    assert not (tmp_path / "copy").exists()


def test_infinities_of_the_source_and_numbers_that_round_down_are_kept(tmp_path):
    tensor = torch.tensor([float("inf"), float("-inf"), float("nan"), 65519.99, 1e-30])
    stored = save({"x": tensor}, tmp_path / "source")
    copy = converted(stored, tmp_path / "copy", "float16")["x"]
    torch.testing.assert_close(copy, tensor.half(), rtol=0, atol=0, equal_nan=True)
    assert copy[3] == 65504


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_source_that_shrank_is_refused(tmp_path, dtype):
    stored = save({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "source")
    os.truncate(tmp_path / "source", (tmp_path / "source").stat().st_size - 1)
    with pytest.raises(ChangedFileError, match="source changed"):
        write_safetensors(tmp_path / "copy", stored, dtype=dtype)
    unknown = {name: replace(tensor, origin=None) for name, tensor in stored.items()}
    with pytest.raises(CheckpointError, match="ends in the middle of 'b'"):
        write_safetensors(tmp_path / "copy", unknown, dtype=dtype)
    with pytest.raises(CheckpointError, match="ends in the middle of 'b'"):
        weights_digest(unknown)
    (tmp_path / "source").unlink()
    with pytest.raises(CheckpointError, match="'a' cannot be read from"):
        write_safetensors(tmp_path / "copy", stored, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def rename(path):
    save_file({"a": torch.zeros(3000)}, path.with_name("new"))
    path.with_name("new").replace(path)


def rewrite(path):
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")


@pytest.mark.parametrize("change", [rename, rewrite])
def test_no_reader_takes_bytes_of_a_file_that_changed_since_its_header_was_read(tmp_path, change):
    stored = save({"a": torch.ones(3000)}, tmp_path / "source")
    same = save({"a": torch.ones(3000)}, tmp_path / "same")
    change(tmp_path / "source")
    readers = (
        lambda: weights_digest(stored),
        lambda: write_safetensors(tmp_path / "copy", stored),
        lambda: stored["a"].read(),
        lambda: stored["a"].holds_the_same_as(same["a"]),
        lambda: same["a"].holds_the_same_as(stored["a"]),
    )
    for reader in readers:
        with pytest.raises(ChangedFileError, match="source changed"):
            reader()
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_is_rewritten_while_it_is_read_is_found_after_the_last_byte(tmp_path, first):
    stored = save({"a": torch.ones(3000)}, tmp_path / "source")["a"]
    chunks = stored.chunks(memoryview(bytearray(1000)))
    next(chunks)
    if not first:
        for _ in range(11):
            next(chunks)
    rewrite(tmp_path / "source")
    with pytest.raises(ChangedFileError, match="source changed"):
        list(chunks)


def test_an_existing_file_is_never_overwritten(tmp_path):
    stored = save({"a": torch.ones(10)}, tmp_path / "source")
    before = (tmp_path / "source").read_bytes()
    with pytest.raises(ConfigurationError, match=r"source cannot be written: .*exists"):
        write_safetensors(tmp_path / "source", stored, dtype="bfloat16")
    assert (tmp_path / "source").read_bytes() == before


def test_an_unknown_target_is_refused(tmp_path):
    stored = save({"a": torch.ones(10)}, tmp_path / "source")
    with pytest.raises(ConfigurationError, match="'int8'"):
        write_safetensors(tmp_path / "copy", stored, dtype="int8")
    assert not (tmp_path / "copy").exists()


def test_a_disk_that_takes_no_more_leaves_no_file(tmp_path):
    stored = save({"a": torch.ones(10_000)}, tmp_path / "source")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ConfigurationError, match=r"copy cannot be written: .*File too large"):
            write_safetensors(tmp_path / "copy", stored)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "copy").exists()


def test_an_interrupted_copy_leaves_no_file(tmp_path):
    def interrupt(read):
        raise KeyboardInterrupt

    stored = save({"a": torch.ones(10)}, tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "copy", stored, progress=interrupt)
    assert not (tmp_path / "copy").exists()


def tower_digest(folder):
    return weights_digest(Checkpoint(folder).with_prefix(("visual.", "model.visual.")))


def test_the_digest_does_not_depend_on_shards_order_and_prefix(tmp_path):
    random_checkpoint(tmp_path / "one", dtype="bfloat16")
    random_checkpoint(tmp_path / "prefixed", dtype="bfloat16", prefix="model.visual.")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "config.json").write_text("{}")
    weight_map = {}
    for part in range(3):
        names = sorted(tensors, reverse=True)[part::3]
        save_file({name: tensors[name] for name in names}, tmp_path / "parts" / f"{part}.safetensors")
        weight_map |= dict.fromkeys(names, f"{part}.safetensors")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    read = []
    stored = Checkpoint(tmp_path / "one").with_prefix(("visual.",))
    digest = weights_digest(stored, read.append)
    assert digest == tower_digest(tmp_path / "prefixed") == tower_digest(tmp_path / "parts")
    assert sum(read) == sum(entry.length for entry in stored.values())


def test_the_digest_is_of_the_documented_bytes(tmp_path):
    tensors = {"z": torch.tensor(1.5), "a.ä": torch.arange(600_000, dtype=torch.bfloat16).reshape(2, -1)}
    expected = hashlib.sha256()
    for name, dtype, shape in (("a.ä", "bfloat16", "2,300000"), ("z", "float32", "")):
        raw = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        for text in (name, dtype, shape, str(len(raw))):
            expected.update(struct.pack("<Q", len(text.encode())) + text.encode())
        expected.update(raw)
    assert weights_digest(save(tensors, tmp_path / "file")) == f"sha256:{expected.hexdigest()}"


def test_the_digest_tells_apart_what_differs(tmp_path):
    base = {"a": torch.arange(6, dtype=torch.int16).reshape(2, 3), "b": torch.arange(4, dtype=torch.int16)}
    joined = torch.cat([base["a"].reshape(-1), base["b"]])
    flipped = base["b"].clone()
    flipped[3] ^= 1 << 14
    variants = [
        base,
        {**base, "b": flipped},
        {"a": base["a"], "c": base["b"]},
        {"a": base["b"], "b": base["a"]},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].reshape(6)},
        {**base, "a": base["a"].reshape(1, 2, 3)},
        {**base, "b": base["b"].view(torch.uint16)},
        {**base, "b": base["b"].view(torch.float16)},
        {**base, "b": base["b"].view(torch.bfloat16)},
        {"a": joined[:4].clone(), "b": joined[4:].clone()},
        {"a": joined},
        {"a": base["a"]},
        {**base, "c": torch.zeros(0)},
        {},
    ]
    digests = {weights_digest(save(tensors, tmp_path / str(i))) for i, tensors in enumerate(variants)}
    assert len(digests) == len(variants)
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


MEMORY = """
import json, sys
from pathlib import Path
from visionaccel.checkpoint import read_header
from visionaccel.checkpoint import weights_digest, write_safetensors

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

source, copy, work = sys.argv[1:]
tensors, _ = read_header(Path(source))
before = peak()
if work == "digest":
    weights_digest(tensors)
else:
    write_safetensors(Path(copy), tensors, dtype=None if work == "copy" else work)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("work", ["digest", "copy", "float16"])
def test_memory_does_not_grow_with_a_tensor(tmp_path, work):
    """One tensor of 640 MiB, a hole in its file."""
    size = 640 << 20
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(source, 8 + len(header) + size)
    command = [sys.executable, "-c", MEMORY, str(source), str(copy), work]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    copy.unlink(missing_ok=True)
    assert grown < 32 << 20
