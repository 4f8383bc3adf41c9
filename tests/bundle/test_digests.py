"""Digests are remembered while files stay as they are, and no longer."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from visionaccel.bundle import MANIFEST, open_bundle, tower_digest
from visionaccel.checkpoint import weights_digest
from visionaccel.core import digests
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError


@pytest.fixture
def remembering(monkeypatch, tmp_path):
    """A memory of its own that takes young files too; the files whose bytes are read."""
    read = []

    def spy(file, *arguments, digest=hashlib.file_digest):
        read.append(Path(file.name).name)
        return digest(file, *arguments)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(digests.hashlib, "file_digest", spy)
    return read


def bytes_read():
    """What this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


def test_a_second_opening_reads_no_file_again(bundle, remembering):
    open_bundle(bundle)
    assert len(remembering) == len(list(bundle.iterdir())) - 1
    remembering.clear()
    before = bytes_read()
    open_bundle(bundle)
    assert bytes_read() - before < (bundle / "model.safetensors").stat().st_size / 4
    assert not remembering


def test_a_second_opening_reads_no_weights_of_the_checkpoint_again(tiny, referring, remembering):
    open_bundle(referring)
    before = bytes_read()
    open_bundle(referring)
    assert bytes_read() - before < (tiny / "model.safetensors").stat().st_size / 4


def test_the_same_tensors_under_other_names_have_another_digest(tiny, remembering):
    tower = open_tower(tiny)
    norms = [name for name in tower.weights if name.endswith("norm1.weight")]
    swapped = dict(zip(norms, reversed(norms), strict=True))
    renamed = tower.over({name: tower.weights[swapped.get(name, name)] for name in tower.weights})
    assert tower_digest(tower) == weights_digest(tower.weights)
    assert tower_digest(renamed) == weights_digest(renamed.weights) != tower_digest(tower)


def test_a_full_check_reads_every_file(bundle, remembering):
    open_bundle(bundle)
    remembering.clear()
    open_bundle(bundle, trust_unchanged=False)
    assert sorted(remembering) == sorted(file.name for file in bundle.iterdir() if file.name != MANIFEST)


def test_a_changed_file_is_noticed_though_its_time_was_set_back(bundle, remembering):
    open_bundle(bundle)
    path = bundle / "model.safetensors"
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    with pytest.raises(BundleError, match="is damaged"):
        open_bundle(bundle)


def test_a_replaced_file_is_noticed(bundle, remembering):
    open_bundle(bundle)
    path = bundle / "model.safetensors"
    status = path.stat()
    other = bundle / "other"
    other.write_bytes(bytes(status.st_size))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    with pytest.raises(BundleError, match="is damaged"):
        open_bundle(bundle)


def test_a_file_that_may_still_change_is_not_remembered(bundle, remembering, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", 3600.0)
    open_bundle(bundle)
    remembering.clear()
    open_bundle(bundle)
    assert "model.safetensors" in remembering


def test_a_file_that_was_written_while_its_digest_was_computed_is_not_remembered(tmp_path, remembering, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    answers = []

    def compute():
        path.write_bytes(b"new")
        answers.append(len(answers))
        return f"digest {len(answers)}"

    for _ in range(2):
        digests.remembered_digest("test", [path], compute)
    assert answers == [0, 1]


def test_a_file_that_was_young_when_its_digest_was_begun_is_not_remembered(tmp_path, remembering, monkeypatch):
    """Until then it could be overwritten without another time; that the digest took long does not help."""
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", 0.3)
    path = tmp_path / "file"
    path.write_bytes(b"new")
    answers = []

    def compute():
        time.sleep(0.4)
        answers.append("digest")
        return "digest"

    for _ in range(3):
        digests.remembered_digest("test", [path], compute)
    assert len(answers) == 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0\xff", b"[]", b'{"x":', b"[" * 100_000, b"7" * 5000, b'{"\\ud800": NaN}',
        b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
    ids=["empty", "binary", "a list", "cut", "nested", "long number", "surrogate", "nested and whole"],
)  # fmt: skip
def test_a_broken_memory_is_ignored(bundle, remembering, tmp_path, content):
    memory = tmp_path / "memory" / "visionaccel" / "digests.json"
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    open_bundle(bundle)
    assert "model.safetensors" in remembering
    assert [file for file in memory.parent.iterdir() if file != memory] == [], "nothing half-written is left"


NO_DIGEST = "the right state and a number for a digest"


@pytest.mark.parametrize("entry", [None, 7, [], {}, {"state": None}, NO_DIGEST], ids=str)
def test_a_strange_entry_of_the_memory_is_ignored(bundle, remembering, tmp_path, entry):
    open_bundle(bundle)
    memory = tmp_path / "memory" / "visionaccel" / "digests.json"
    known = json.loads(memory.read_text())
    if entry == NO_DIGEST:
        changed = {key: {**value, "digest": 7} for key, value in known.items()}
    else:
        changed = dict.fromkeys(known, entry)
    memory.write_text(json.dumps(changed))
    remembering.clear()
    open_bundle(bundle)
    assert "model.safetensors" in remembering


@pytest.mark.parametrize("place", ["below a file", "a folder"])
def test_a_memory_that_cannot_be_written_costs_nothing_but_time(bundle, remembering, tmp_path, monkeypatch, place):
    if place == "a folder":
        (tmp_path / "memory" / "visionaccel" / "digests.json" / "x").mkdir(parents=True)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(bundle / "config.json"))
    for _ in range(2):
        remembering.clear()
        open_bundle(bundle)
        assert "model.safetensors" in remembering


def test_no_memory_is_wanted_where_there_is_no_home(bundle, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    open_bundle(bundle)
