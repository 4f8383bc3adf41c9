"""The command, run as users run it: in a process, with its exit status, and JSON that can be read."""

import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from command_line import run_command
from fake_plugins import install_all
from visionaccel.cli.app import app
from visionaccel.cli.output import backend_options
from visionaccel.errors import SettingsError
from visionaccel.families import GROUP


def run(*arguments, check=None):
    """Run the command; assert its exit status."""
    done = run_command(*arguments, environment=os.environ)
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
        ("flexmlrt", "refused"),
        ("onnxrt", "chosen"),
        ("openvino", "accepted"),
        ("simulated", "refused"),
        ("torch_ref", "accepted"),
    ]
    architecture = "Qwen2_5_VLForConditionalGeneration"
    assert (answer["family"], answer["architecture"]) == ("qwen2_5_vl", architecture)
    assert answer["vllm"] == ["inline", "pipelined"]
    printed = " ".join(run("explain", tiny).stdout.split())
    assert "chosen" in printed
    assert "family qwen2_5_vl" in printed
    assert f"vLLM can serve {architecture} with a backend, in-line and pipelined." in printed


def test_a_family_without_a_row_for_vllm_is_explained_and_diagnosed(tiny, tmp_path, monkeypatch):
    source = "from visionaccel.families.qwen2_5_vl import FAMILY"
    site = install_all(tmp_path / "site", "other", {GROUP: {"OtherModel": "other:FAMILY"}}, source)
    monkeypatch.setenv("PYTHONPATH", str(site))
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["OtherModel"]}))
    (tmp_path / "model.safetensors").symlink_to(tiny / "model.safetensors")
    answer = json.loads(run("explain", tmp_path, "--json").stdout)
    assert (answer["family"], answer["architecture"], answer["vllm"]) == ("qwen2_5_vl", "OtherModel", [])
    findings = json.loads(run("doctor", tmp_path, "--backend", "onnxrt", "--no-vllm", "--json").stdout)["findings"]
    (model,) = (row for row in findings if row["what"] == "model")
    assert model["status"] == "warning"
    assert model["found"] == "vLLM cannot serve OtherModel with a backend, because visionaccel has no row for it"


def test_explain_fails_if_none_would_run(tiny):
    answer = json.loads(run("explain", tiny, "--device", "npu", "--json", check=1).stdout)
    assert {row["verdict"] for row in answer["candidates"]} == {"refused"}
    assert all(row["why"] and row["hint"] for row in answer["candidates"])


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


def test_encode_fits_images_to_a_bundles_programs(digits, pictures, tmp_path):
    run("export", digits, tmp_path / "bundle", "--grid", "8x16", "--grid", "16x8", "--self-contained")
    rows = json.loads(run("encode", *pictures, "--bundle", tmp_path / "bundle", "--json").stdout)["images"]
    assert {row["grid"] for row in rows} <= {"1x8x16", "1x16x8"}
    assert [row["tokens"] for row in rows] == [32, 32]
    assert "pass --checkpoint" in run("encode", pictures[0], check=2).stderr.lower()


def test_encode_refuses_another_image_processor_than_the_bundles(digits, pictures, tmp_path):
    from shutil import copytree

    other = copytree(digits, tmp_path / "other")
    config = other / "processor_config.json"
    config.write_text(config.read_text().replace("0.48145466", "0.1"))
    run("export", digits, tmp_path / "bundle", "--self-contained")
    done = run("encode", pictures[0], "--bundle", tmp_path / "bundle", "--checkpoint", other, check=2)
    assert "a different image processor" in done.stderr
    done = run("validate", tmp_path / "bundle", "--reference", other, check=2)
    assert "a different image processor" in done.stderr


def test_explain_says_which_programs_a_backend_takes(digits, tmp_path):
    run("export", digits, tmp_path / "bundle", "--grid", "8x16", "--dynamic")
    rows = {
        row["backend"]: row for row in json.loads(run("explain", tmp_path / "bundle", "--json").stdout)["candidates"]
    }
    assert rows["onnxrt"]["verdict"] == "chosen"
    assert rows["torch_ref"]["verdict"] == "accepted"


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


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("bench", "serve", "--gap", "nan"), "--gap"),
        (("bench", "serve", "--gap", "1e10"), "--gap"),
        (("bench", "serve", "--latency", "inf"), "--latency"),
        (("bench", "encode", "--deadline", "nan"), "--deadline"),
        (("doctor", "--limit", "nan"), "--limit"),
    ],
)
def test_times_on_the_command_line_are_finite(arguments, option):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr


def test_options_that_are_nested_too_deeply_are_a_settings_error(tiny):
    with pytest.raises(SettingsError, match="nested too deeply"):
        backend_options("a=" + "[" * 100_000, {})
