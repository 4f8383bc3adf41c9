"""Untrusted files: what is not a file, or is larger than allowed, is refused before it is read."""

import json
import os
import time

import pytest
from onnx import TensorProto, helper

from bundles import document
from visionaccel.bundle import MANIFEST, ProgramRequest, export_bundle, open_bundle, point_at_weights, seal
from visionaccel.checkpoint import read_header, read_json, weights_digest
from visionaccel.core.bounded_files import MOST_JSON_BYTES, hole_bytes, open_regular, read_bounded
from visionaccel.core.program import AnyGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError, CheckpointError


def test_a_file_is_read_up_to_its_limit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 bytes"):
        read_bounded(file, 4)


def test_reading_sets_aside_no_more_than_the_file_has(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bounded(file, 2**62) == b"12345"


def test_a_hole_of_terabytes_is_not_read(tmp_path):
    file = tmp_path / "file"
    with file.open("wb") as hole:
        hole.truncate(2**43)
    with pytest.raises(ValueError, match="larger than"):
        read_bounded(file)


@pytest.mark.parametrize("path", ["/dev/zero", "pipe", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="not a file"):
        open_regular(tmp_path / path)


READERS = {
    "config.json": lambda path: read_json(path),
    "model.safetensors": lambda path: read_header(path),
    MANIFEST: lambda path: open_bundle(path.parent),
}


@pytest.mark.parametrize("name", READERS)
def test_a_named_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises((BundleError, CheckpointError), match="not a file"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_a_document_that_is_too_large_is_not_parsed(tmp_path, name):
    (tmp_path / name).write_bytes(b"{" + b" " * MOST_JSON_BYTES + b"}")
    with pytest.raises((BundleError, CheckpointError), match=f"larger than {MOST_JSON_BYTES}"):
        READERS[name](tmp_path / name)


def weights(folder, header, length=None):
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes((length or len(text)).to_bytes(8, "little") + text + bytes(64))
    return file


def test_a_header_that_is_too_large_is_not_read(tmp_path):
    file = weights(tmp_path, {}, MOST_JSON_BYTES + 1)
    with file.open("r+b") as hole:
        hole.truncate(2**40)
    with pytest.raises(CheckpointError, match=rf"has a safetensors header of {MOST_JSON_BYTES + 1} bytes"):
        read_header(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [-2, -2]}, {"shape": [2.0, 2]}, {"shape": ["2", "2"]}, {"shape": [True, 4]}, {"shape": [2**63, 0]},
        {"data_offsets": ["0", "16"]}, {"data_offsets": [0.0, 16]}, {"data_offsets": [-16, 0]},
    ],
)  # fmt: skip
def test_sizes_and_offsets_are_whole_numbers_and_not_negative(tmp_path, changes):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    assert read_header(weights(tmp_path, {"w": entry}))[0]["w"].shape == (2, 2)
    with pytest.raises(CheckpointError, match="malformed"):
        read_header(weights(tmp_path, {"w": {**entry, **changes}}))


MANY = [2**62] * 300_000
"""Sizes whose product takes minutes."""


TERABYTE = 2**40


def test_a_sparse_file_of_terabytes_is_not_hashed(tmp_path, tiny):
    started = time.process_time()
    entry = {"dtype": "U8", "shape": [TERABYTE], "data_offsets": [0, TERABYTE]}
    path = weights(tmp_path, {"w": entry})
    os.truncate(path, path.stat().st_size + TERABYTE)
    stored, _ = read_header(path)
    with pytest.raises(CheckpointError, match="is sparse: more than 4 GiB"):
        weights_digest(stored)
    folder = export_bundle(
        open_tower(tiny), tmp_path / "bundle", [ProgramRequest(AnyGrid())], self_contained=True
    ).folder
    stated = document(folder)
    model = folder / "model.safetensors"
    os.truncate(model, TERABYTE)
    for file in stated["files"]:
        if file["path"] == model.name:
            file["bytes"] = TERABYTE
    (folder / MANIFEST).write_text(json.dumps(seal(stated).model_dump(mode="json")))
    with pytest.raises(BundleError, match="is sparse: more than 4 GiB"):
        open_bundle(folder)
    assert time.process_time() - started < 10


def test_holes_are_counted_where_they_are(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes([1]) * 2**16)
        file.seek(2**20, os.SEEK_CUR)
        file.write(bytes([1]) * 2**16)
    size = path.stat().st_size
    assert hole_bytes(path, 0, size) == pytest.approx(2**20, abs=2**16)
    assert hole_bytes(path, 0, 2**15) == hole_bytes(path, size - 2**15, size) == 0
    (tmp_path / "plain").write_bytes(bytes(100))
    assert hole_bytes(tmp_path / "plain", 0, 100) == 0


def test_very_many_dimensions_are_refused_before_they_are_multiplied(tiny, tmp_path):
    started = time.process_time()
    with pytest.raises(CheckpointError, match="malformed"):
        read_header(weights(tmp_path, {"w": {"dtype": "F32", "shape": MANY[:60_000], "data_offsets": [0, 16]}}))
    tower = open_tower(tiny)
    name = next(name for name, stored in tower.weights.items() if len(stored.shape) > 1)
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL, dims=MANY)
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    with pytest.raises(BundleError, match="a different dtype or size"):
        point_at_weights(model.SerializeToString(), tower.weights, tower.weights_folder)
    assert time.process_time() - started < 20
