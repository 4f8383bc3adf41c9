"""The command, run as users run it: in a process, with its exit status, and JSON that can be read."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from towers import random_patches, reference
from visionaccel.encoder import open_tower
from visionaccel.grid import as_grids


def run(*arguments, check=None):
    """Run the command; assert its exit status."""
    command = [sys.executable, "-c", "from visionaccel.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == (check or 0), done.stderr
    return done


def test_backends_lists_devices_and_options():
    rows = {row["name"]: row for row in json.loads(run("backends", "--json").stdout)}
    assert rows["onnxrt"]["distribution"] == "visionaccel-onnxrt"
    assert rows["onnxrt"]["devices"] == ["cpu"]
    assert "threads" in rows["onnxrt"]["options"]
    assert rows["torch_ref"]["formats"] == ["checkpoint"]
    assert all(row["problem"] is None for row in rows.values())
    assert "onnxrt" in run("backends").stdout


def test_explain_gives_each_verdict(tiny):
    answer = json.loads(run("explain", tiny, "--json").stdout)
    assert [(row["backend"], row["verdict"]) for row in answer["candidates"]] == [
        ("onnxrt", "chosen"),
        ("torch_ref", "accepted"),
    ]
    assert "chosen" in run("explain", tiny).stdout


def test_explain_fails_if_none_would_run(tiny):
    answer = json.loads(run("explain", tiny, "--device", "npu", "--json", check=1).stdout)
    assert {row["verdict"] for row in answer["candidates"]} == {"refused"}
    assert all(row["why"] and row["hint"] for row in answer["candidates"])


def test_export_writes_a_graph_that_onnx_runtime_opens_by_its_path(tiny, tmp_path):
    target = tmp_path / "out" / "tower.onnx"
    result = json.loads(run("export", tiny, target, "--json").stdout)
    assert set(result["weights"].values()) == {"hard-linked"}
    assert (target.parent / "model.safetensors").samefile(tiny / "model.safetensors")
    grids = [(1, 6, 10)]
    patches, tower = random_patches(grids), open_tower(tiny)
    inputs = tower.inputs(tower.programs(["onnx"])[0], patches, as_grids(grids))
    (embeddings,) = onnxruntime.InferenceSession(target).run(None, dict(inputs))
    np.testing.assert_allclose(embeddings, reference(tiny, patches, grids), rtol=0, atol=2e-5)


def test_export_copies_when_asked_and_never_overwrites(tiny, tmp_path):
    target = tmp_path / "tower.onnx"
    assert "copied" in run("export", tiny, target, "--weights", "copy").stdout
    assert not (tmp_path / "model.safetensors").samefile(tiny / "model.safetensors")
    assert "--force" in run("export", tiny, target, check=2).stderr
    assert "is another file" in run("export", tiny, target, "--force", check=2).stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "tower.onnx"]


def test_export_beside_or_above_the_weights_touches_nothing_else(tmp_path):
    from visionaccel.testing.checkpoints import random_checkpoint

    folder = random_checkpoint(tmp_path / "checkpoint", shards=2)
    for target in (folder / "tower.onnx", tmp_path / "tower.onnx"):
        result = json.loads(run("export", folder, target, "--json").stdout)
        assert set(result["weights"].values()) == {"in place"}
        onnxruntime.InferenceSession(target)


@pytest.fixture
def pictures(tmp_path):
    from digits_vlm.samples import held_out_images

    paths = [tmp_path / f"picture{i}.png" for i in range(2)]
    for path, sample in zip(paths, held_out_images(2), strict=True):
        sample.image.save(path)
    return paths


def test_encode_writes_embeddings_of_every_image(digits, pictures, tmp_path):
    output = tmp_path / "embeddings.bin"
    arguments = ("encode", *pictures, "--checkpoint", digits, "--json")
    answers = {
        backend: json.loads(run(*arguments, "--backend", backend, "--output", output).stdout)
        for backend in ("onnxrt", "torch_ref")
    }
    arrays = np.load(output)
    assert list(arrays) == ["0_picture0", "1_picture1"]
    for row, array in zip(answers["onnxrt"]["images"], arrays.values(), strict=True):
        assert array.shape == (row["tokens"], 128)
    for ours, theirs in zip(answers["onnxrt"]["images"], answers["torch_ref"]["images"], strict=True):
        assert ours["grid"] == theirs["grid"]
        assert ours["mean_norm"] == pytest.approx(theirs["mean_norm"], rel=1e-5)


def test_encode_refuses_what_is_no_image(digits, pictures):
    pictures[0].write_bytes(pictures[0].read_bytes()[:200])
    done = run("encode", pictures[0], "--checkpoint", digits, "--json", check=2)
    assert json.loads(done.stdout)["error"] == "InputError"
    assert "cannot be read as an image" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("explain", "/nowhere"), "CheckpointError"),
        (("export", "/nowhere", "/nowhere/x.onnx"), "CheckpointError"),
        (("encode", "x.png", "--checkpoint", "{digits}", "--backend", "onnxtr"), "UnknownBackendError"),
        (("encode", "x.png", "--checkpoint", "{digits}", "--options", "threads"), "SettingsError"),
        (("demo", "--backend", "onnxtr"), "UnknownBackendError"),
    ],
)
def test_errors_are_one_message_and_status_2(digits, arguments, error):
    done = run(*(argument.format(digits=digits) for argument in arguments), check=2)
    assert done.stderr.startswith(error)
    assert "Traceback" not in done.stderr


def test_the_version_is_printed():
    import visionaccel

    assert run("--version").stdout.strip() == visionaccel.__version__
