"""Stripped checkpoints: everything but the vision weights, byte for byte, or nothing at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from visionaccel.bundle import STRIP_NOTE, read_strip_note, strip_checkpoint
from visionaccel.checkpoint import Checkpoint, weights_digest
from visionaccel.cli.export import strip
from visionaccel.errors import ChangedFileError, CheckpointError, ConfigurationError, UnsupportedArchitectureError
from visionaccel.families import tower_of
from visionaccel_testing.checkpoints import random_checkpoint

INDEX = "model.safetensors.index.json"
VISION_ONLY, LANGUAGE_ONLY, MIXED = "model-00001.safetensors", "model-00002.safetensors", "model-00003.safetensors"


def language_model():
    rng = np.random.default_rng(1)
    return {
        "model.embed_tokens.weight": rng.standard_normal((50, 16), dtype=np.float32),
        "model.layers.0.weight": rng.standard_normal((16, 16)).astype(np.float16),
        "model.layers.0.scale": np.array(3, dtype=np.int64),
        "model.layers.1.empty": np.zeros((0, 4), dtype=np.uint8),
        "model.visual_bias": np.arange(3, dtype=np.uint8),
        "lm_head.weight": rng.standard_normal((50, 16), dtype=np.float32),
    }


def whole_checkpoint(folder, *, prefix="visual.", sharded=False):
    """A checkpoint of a tiny tower, tensors of a language model, and a tokenizer's file."""
    random_checkpoint(folder, prefix=prefix)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    tower, language = load_file(folder / "model.safetensors"), language_model()
    if not sharded:
        save_file({**tower, **language}, folder / "model.safetensors", {"format": "pt", "note": "mixed"})
        return folder
    (folder / "model.safetensors").unlink()
    vision, text = sorted(tower), sorted(language)
    parts = {VISION_ONLY: vision[:20], LANGUAGE_ONLY: text[:3], MIXED: vision[20:] + text[3:]}
    tensors = {**tower, **language}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt", "file": file})
    index = {
        "metadata": {
            "total_size": sum(array.nbytes for array in tensors.values()),
            "total_parameters": sum(array.size for array in tensors.values()),
            "origin": "kept",
        },
        "weight_map": {name: file for file, names in parts.items() for name in names},
        "other": [1, 2],
    }
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def raw(folder):
    """Raw bytes, dtype and shape of every tensor in a folder's safetensors files, as the library reads them."""
    return {
        name: (entry["dtype"], entry["shape"], bytes(entry["data"]))
        for file in Path(folder).glob("*.safetensors")
        for name, entry in deserialize(file.read_bytes())
    }


def everything(folder):
    """Every path below a folder, with the bytes of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}


@pytest.fixture
def whole(tmp_path):
    return whole_checkpoint(tmp_path / "whole")


@pytest.fixture
def sharded(tmp_path):
    return whole_checkpoint(tmp_path / "sharded", sharded=True)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_what_is_left_is_equal_and_the_original_is_untouched(tmp_path, tiny, prefix, is_sharded):
    source = whole_checkpoint(tmp_path / "source", prefix=prefix, sharded=is_sharded)
    before, read = everything(source), []
    report = strip_checkpoint(Checkpoint(source), tmp_path / "deep" / "out", progress=read.append)
    assert everything(source) == before

    out, tensors = tmp_path / "deep" / "out", raw(source)
    left = {name: entry for name, entry in tensors.items() if not name.startswith(prefix)}
    assert raw(out) == left
    assert set(Checkpoint(out).tensors) == set(left) == set(language_model())
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()

    assert report.folder == out
    assert (report.kept_tensors, report.removed_tensors) == (len(left), len(tensors) - len(left))
    assert report.bytes_after == sum(len(entry[2]) for entry in left.values())
    assert report.bytes_before == sum(len(entry[2]) for entry in tensors.values()) == sum(read)
    assert report.skipped == ()
    # The tiny checkpoint has the same tower, alone and in one file.
    assert read_strip_note(out) == report.vision_weights_digest == weights_digest(tower_of(Checkpoint(tiny)).weights)
    assert json.loads((out / STRIP_NOTE).read_text())["family"] == report.family == "qwen2_5_vl"


def test_shards_keep_their_metadata_and_those_of_vision_weights_alone_are_dropped(sharded, tmp_path):
    report = strip_checkpoint(Checkpoint(sharded), tmp_path / "out")
    assert report.shards == (LANGUAGE_ONLY, MIXED)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [LANGUAGE_ONLY, MIXED]
    for shard in report.shards:
        with safe_open(tmp_path / "out" / shard, "numpy") as file:
            assert file.metadata() == {"format": "pt", "file": shard}


def test_the_index_is_rewritten(sharded, tmp_path):
    strip_checkpoint(Checkpoint(sharded), tmp_path / "out")
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (sharded, tmp_path / "out"))
    language = language_model()
    assert after == {
        "metadata": {
            "total_size": sum(array.nbytes for array in language.values()),
            "total_parameters": sum(array.size for array in language.values()),
            "origin": "kept",
        },
        "weight_map": {name: file for name, file in before["weight_map"].items() if name in language},
        "other": [1, 2],
    }


def test_a_vision_tensor_that_two_shards_hold_is_removed_from_both_if_they_agree(sharded, tmp_path):
    tensors, weights = load_file(sharded / LANGUAGE_ONLY), tower_of(Checkpoint(sharded)).weights
    bias = weights["merger.mlp.0.bias"].read()
    save_file({**tensors, "visual.merger.mlp.0.bias": bias}, sharded / LANGUAGE_ONLY)
    strip_checkpoint(Checkpoint(sharded), tmp_path / "out")
    assert set(raw(tmp_path / "out")) == set(language_model())
    save_file({**tensors, "visual.merger.mlp.0.bias": bias + 1}, sharded / LANGUAGE_ONLY)
    with pytest.raises(CheckpointError, match=r"merger\.mlp\.0\.bias.*same weight with different values"):
        strip_checkpoint(Checkpoint(sharded), tmp_path / "again")


def test_a_stale_single_file_next_to_an_index_is_not_stripped_instead_of_the_model(sharded, tmp_path):
    stale = {name: np.asarray(array + 1) for name, array in language_model().items()}
    save_file(stale, sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        strip_checkpoint(Checkpoint(sharded), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("same", [True, False])
def test_a_single_file_next_to_an_index_must_hold_the_same_language_model(sharded, tmp_path, same):
    single = {name: value for path in sharded.glob("*.safetensors") for name, value in load_file(path).items()}
    if not same:
        single["lm_head.weight"] = single["lm_head.weight"] + 1
    save_file(single, sharded / "model.safetensors")
    if same:
        out = strip_checkpoint(Checkpoint(sharded), tmp_path / "out").folder
        assert raw(out).keys() == language_model().keys()
        return
    with pytest.raises(CheckpointError, match=r"contain 'lm_head\.weight' with different values"):
        strip_checkpoint(Checkpoint(sharded), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_without_an_index_are_stripped(sharded, tmp_path):
    (sharded / INDEX).unlink()
    report = strip_checkpoint(Checkpoint(sharded), tmp_path / "out")
    assert report.shards == (LANGUAGE_ONLY, MIXED)
    assert set(raw(tmp_path / "out")) == set(language_model())


def test_a_language_tensor_that_no_shard_holds_does_not_keep_a_checkpoint_from_being_stripped(sharded, tmp_path):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.99.mlp.up_proj.weight"] = LANGUAGE_ONLY
    (sharded / INDEX).write_text(json.dumps(index))
    strip_checkpoint(Checkpoint(sharded), tmp_path / "out")
    assert set(raw(tmp_path / "out")) == set(language_model())


def test_buffers_of_the_tower_are_stripped_too(whole, tmp_path):
    tensors = load_file(whole / "model.safetensors")
    save_file({**tensors, "visual.rotary_pos_emb.inv_freq": np.ones(4, np.float32)}, whole / "model.safetensors")
    strip_checkpoint(Checkpoint(whole), tmp_path / "out")
    assert set(raw(tmp_path / "out")) == set(language_model())


def test_the_digits_checkpoint_keeps_its_language_model(digits, tmp_path):
    report = strip_checkpoint(Checkpoint(digits), tmp_path / "out")
    before, after = load_file(digits / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(after) == {name for name in before if not name.startswith("visual.")}
    assert len(after) == report.kept_tensors
    for name, array in after.items():
        assert array.dtype == before[name].dtype
        np.testing.assert_array_equal(array, before[name])
    copied = {path.name for path in digits.iterdir()} | {STRIP_NOTE}
    assert {path.name for path in (tmp_path / "out").iterdir()} == copied


def test_files_are_copied_but_hidden_ones_and_further_weights(whole, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "blob").write_text("linked")
    wanted = {"merges.txt": "m", "sub/deep/template.jinja": "t", "code.py": "c"}
    unwanted = [
        ".gitattributes",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "ggml-q4.GGUF",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "sub/model.safetensors",
        "tower.onnx",
    ]
    for name in [*wanted, *unwanted, ".cache/x"]:
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text(wanted.get(name, "weights"))
    (whole / "vocab.json").symlink_to(os.path.relpath(store / "blob", whole))
    (whole / "linked").symlink_to(store)
    report = strip_checkpoint(Checkpoint(whole), tmp_path / "out")
    assert set(report.skipped) == {*unwanted, ".cache/"}
    texts = {**wanted, "vocab.json": "linked", "linked/blob": "linked", "tokenizer.json": '{"a": 1}'}
    assert {name: (tmp_path / "out" / name).read_text() for name in texts} == texts
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {*texts, "config.json", "model.safetensors", STRIP_NOTE}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_snapshot_of_the_hub_cache_is_stripped(sharded, tmp_path):
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    report = strip_checkpoint(Checkpoint(snapshot), tmp_path / "out")
    assert report.shards == (LANGUAGE_ONLY, MIXED)
    assert set(raw(tmp_path / "out")) == set(language_model())


def test_what_exists_is_not_replaced(whole, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = everything(tmp_path)
    for name in ("folder", "file", "link", "whole"):
        with pytest.raises(ConfigurationError, match=f"{name} already exists"):
            strip_checkpoint(Checkpoint(whole), tmp_path / name)
    assert everything(tmp_path) == before


def test_the_checkpoints_own_folder_is_not_written_to(whole, tmp_path):
    (tmp_path / "way").symlink_to(whole)
    before = everything(tmp_path)
    for folder in (whole, tmp_path / "way"):
        for out in (whole / "out", whole / "sub" / "out", tmp_path / "way" / "out"):
            with pytest.raises(ConfigurationError, match="inside the checkpoint's folder"):
                strip_checkpoint(Checkpoint(folder), out)
    assert everything(tmp_path) == before


def test_a_stripped_checkpoint_is_not_stripped_again(whole, tmp_path):
    strip_checkpoint(Checkpoint(whole), tmp_path / "once")
    with pytest.raises(CheckpointError, match="no vision weights to strip"):
        strip_checkpoint(Checkpoint(tmp_path / "once"), tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_checkpoint_of_the_tower_alone_is_refused(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="nothing would be left"):
        strip_checkpoint(Checkpoint(tiny), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_architectures_are_refused(whole, tmp_path):
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "architectures": ["LlavaForConditionalGeneration"]}))
    with pytest.raises(UnsupportedArchitectureError, match="Llava"):
        strip_checkpoint(Checkpoint(whole), tmp_path / "out")


def test_vision_weights_under_both_prefixes_are_not_left_behind(whole, tmp_path):
    tensors = load_file(whole / "model.safetensors")
    twins = {f"model.{name}": array for name, array in tensors.items() if name.startswith("visual.")}
    save_file({**tensors, **twins}, whole / "model.safetensors")
    strip_checkpoint(Checkpoint(whole), tmp_path / "out")
    assert set(raw(tmp_path / "out")) == set(language_model())
    twins["model.visual.merger.mlp.0.bias"] = twins["model.visual.merger.mlp.0.bias"] + 1
    save_file({**tensors, **twins}, whole / "model.safetensors")
    with pytest.raises(CheckpointError, match="are the same weight with different values"):
        strip_checkpoint(Checkpoint(whole), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_damaged_shard_is_refused_as_damaged(sharded, tmp_path):
    os.truncate(sharded / LANGUAGE_ONLY, (sharded / LANGUAGE_ONLY).stat().st_size - 1)
    with pytest.raises(CheckpointError, match="should end at byte"):
        strip_checkpoint(Checkpoint(sharded), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [sharded]


@pytest.mark.parametrize(("target", "message"), [("missing", "broken link"), (".", "folder that contains it")])
def test_links_that_cannot_be_followed_are_named(whole, tmp_path, target, message):
    (whole / "extra").symlink_to(target)
    with pytest.raises(CheckpointError, match=rf"extra is a .*{message}"):
        strip_checkpoint(Checkpoint(whole), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [whole]


def test_too_little_space_is_found_before_anything_is_written(whole, tmp_path, monkeypatch):
    written = strip_checkpoint(Checkpoint(whole), tmp_path / "fits")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=written.bytes_after))
    with pytest.raises(ConfigurationError, match="GiB free"):
        strip_checkpoint(Checkpoint(whole), tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits", "whole"]


def test_a_folder_that_cannot_be_made_is_refused(whole, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        strip_checkpoint(Checkpoint(whole), tmp_path / "file" / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_at_any_point_leaves_nothing(sharded, tmp_path, error):
    steps = []
    strip_checkpoint(Checkpoint(sharded), tmp_path / "whole", progress=steps.append)
    shutil.rmtree(tmp_path / "whole")
    before = everything(tmp_path)
    for stop in range(0, len(steps), 5):
        seen = []

        def interrupt(read, seen=seen, stop=stop):
            seen.append(read)
            if len(seen) > stop:
                raise error

        with pytest.raises(error):
            strip_checkpoint(Checkpoint(sharded), tmp_path / "out", progress=interrupt)
        assert everything(tmp_path) == before


def test_a_source_that_shrinks_meanwhile_leaves_nothing(whole, tmp_path):
    def shrink(read):
        os.truncate(whole / "model.safetensors", 5000)

    with pytest.raises(ChangedFileError, match=r"model\.safetensors changed"):
        strip_checkpoint(Checkpoint(whole), tmp_path / "out", progress=shrink)
    assert list(tmp_path.iterdir()) == [whole]


def test_a_checkpoint_that_is_replaced_between_the_steps_is_not_noted_as_the_one_before(whole, tmp_path):
    """The digest is read first: the language model that is copied then must be of the same file."""
    checkpoint = Checkpoint(whole)
    vision_bytes = sum(tensor.length for tensor in tower_of(checkpoint).weights.values())
    other = {name: np.array(array * 2) for name, array in load_file(whole / "model.safetensors").items()}
    save_file(other, tmp_path / "other.safetensors")
    done = []

    def replace(read):
        done.append(read)
        if sum(done) == vision_bytes:
            (tmp_path / "other.safetensors").replace(whole / "model.safetensors")

    with pytest.raises(ChangedFileError, match=r"model\.safetensors changed"):
        strip_checkpoint(checkpoint, tmp_path / "out", progress=replace)
    assert sum(done) == vision_bytes
    assert list(tmp_path.iterdir()) == [whole]


def test_a_checkpoint_without_a_note_says_nothing(whole):
    assert read_strip_note(whole) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"vision_weights_digest": 5}', '{"vision_weights_digest": "sha256:12"}']
    + [json.dumps({"vision_weights_digest": digest}) for digest in ("sha256:" + "G" * 64, "sha256:" + "a" * 64 + "\n")],
)
def test_a_malformed_note_is_refused(whole, text):
    (whole / STRIP_NOTE).write_text(text)
    with pytest.raises(CheckpointError, match=STRIP_NOTE):
        read_strip_note(whole)


def test_a_note_that_is_a_broken_link_is_refused(whole):
    (whole / STRIP_NOTE).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=STRIP_NOTE):
        read_strip_note(whole)


@pytest.fixture
def command():
    """The subcommand as an application of its own."""
    app = typer.Typer()
    app.command()(strip)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_tells_sizes_before_and_after(command, sharded, tmp_path):
    (sharded / "tower.onnx").write_text("graph")
    done = command(sharded, tmp_path / "out", "--json")
    answer = json.loads(done.stdout)
    before, after = (sum(len(entry[2]) for entry in raw(folder).values()) for folder in (sharded, tmp_path / "out"))
    assert (answer["bytes_before"], answer["bytes_after"]) == (before, after)
    assert answer["removed_tensors"] == len(raw(sharded)) - len(language_model())
    assert answer["vision_weights_digest"] == read_strip_note(tmp_path / "out")
    assert answer["skipped"] == ["tower.onnx"]

    text = command(sharded, tmp_path / "again").stdout
    assert f"{answer['removed_tensors']} of the vision tower removed, {len(language_model())} kept" in text
    assert "not copied: tower.onnx" in text


def test_the_command_wants_a_folder(command, tmp_path):
    failed = command("Qwen/Qwen2.5-VL-7B-Instruct", tmp_path / "out")
    assert isinstance(failed.exception, ConfigurationError)
    assert "hf download" in str(failed.exception)


MEMORY = """
import sys
from pathlib import Path
from visionaccel.checkpoint import Checkpoint
from visionaccel.bundle import strip_checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
strip_checkpoint(Checkpoint(Path(sys.argv[1])), Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_checkpoint(tiny, tmp_path):
    """A vision tensor and a language tensor of 320 MiB each, holes in their file."""
    folder, out, size = tmp_path / "hollow", tmp_path / "out", 320 << 20
    folder.mkdir()
    document = json.loads((tiny / "config.json").read_text())
    shape = [size // 4 // 128, 128]
    document["vision_config"]["out_hidden_size"] = shape[0]
    (folder / "config.json").write_text(json.dumps(document))
    names = ("model.embed_tokens.weight", "visual.merger.mlp.2.weight")
    entries = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(folder / "model.safetensors", 8 + len(header) + 2 * size)
    command = [sys.executable, "-c", MEMORY, str(folder), str(out)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert (out / "model.safetensors").stat().st_size > size
    shutil.rmtree(out)
    assert grown < 32 << 20
