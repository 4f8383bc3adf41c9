"""`visionaccel validate --task`: a good bundle answers as the model's own tower does, and a bad one is found out."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from bundles import edit_index, edit_model, write_bundle
from visionaccel.bundle import MANIFEST
from visionaccel.cli.app import app
from visionaccel.errors import ConfigurationError, InputError

GRID, SIZE, OTHER = "8x12", (112, 168), (196, 112)
"""A grid in patches, the height and width of its images in pixels, and those of images that do not fit."""


def write_task(folder, *sizes):
    """Write a task of digits, with an image of each size; return its file and the digits."""
    from digits_vlm.samples import digits_image

    rng, lines = np.random.default_rng(3), []
    (folder / "images").mkdir()
    for number, size in enumerate(sizes):
        sample = digits_image(rng, "held_out", size, most=3)
        sample.image.save(folder / "images" / f"{number}.png")
        lines.append({"image": f"images/{number}.png", "question": "Read the digits.", "answer": sample.truth})
    (folder / "task.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / "task.jsonl"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"), *[SIZE] * 5)


@pytest.fixture(scope="module")
def good(digits, tmp_path_factory):
    return write_bundle(digits, tmp_path_factory.mktemp("good") / "bundle", GRID)


@pytest.fixture(scope="module")
def bad(good, tmp_path_factory):
    """The same bundle, whose program reads the patches of an image in another order."""
    folder = shutil.copytree(good, tmp_path_factory.mktemp("bad") / "bundle")
    shuffle = np.random.default_rng(0).permutation
    edit_model(folder, GRID, lambda model: edit_index(model, 0, shuffle))
    return folder


def validate(bundle, *arguments, status=0):
    """Run the command on ONNX Runtime; assert its exit status, and return what it prints."""
    words = ["validate", bundle, "--backend", "onnxrt", *arguments]
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done.stdout


def test_a_good_bundle_answers_as_the_models_own_tower(digits, good, task):
    before = (good / MANIFEST).read_bytes()
    found = json.loads(validate(good, "--reference", digits, "--task", task, "--json"))
    assert (found["backend"], found["device"], found["questions"]) == ("onnxrt", "cpu", 5)
    assert found["agreement"] == found["accuracy"] == found["reference_accuracy"] == 1
    assert 0 <= found["mean_drift"] <= found["largest_drift"] < 1e-4
    assert found["failure"] is None
    assert [row["line"] for row in found["answers"]] == [1, 2, 3, 4, 5]
    assert not any(row["fitted"] for row in found["answers"])
    assert (good / MANIFEST).read_bytes() == before, "the answers are not part of the certificate"


def test_a_bad_program_is_found_out(digits, bad, task):
    found = json.loads(validate(bad, "--reference", digits, "--task", task, "--json", status=1))
    assert found["agreement"] < 1
    assert found["accuracy"] < found["reference_accuracy"] == 1
    assert found["largest_drift"] >= found["mean_drift"] > 1e-2
    assert "below the reference's" in found["failure"]
    wrong = [row for row in found["answers"] if not row["agrees"]]
    assert all(row["reference"] == row["expected"] != row["answer"] for row in wrong)


def test_the_margin_is_what_may_be_lost(digits, bad, task):
    printed = validate(bad, "--reference", digits, "--task", task, "--margin", "1")
    assert "Answers that differ" in printed
    assert printed.rstrip().endswith("Passed.")


def test_images_are_fitted_except_for_the_reference(digits, good, tmp_path, told):
    task = write_task(tmp_path, SIZE, OTHER)
    found = json.loads(validate(good, "--reference", digits, "--task", task, "--margin", "1", "--json"))
    assert [row["fitted"] for row in found["answers"]] == [False, True]
    assert {str(report.grids[0]) for report in told.encoded if report.purpose == "request"} == {f"1x{GRID}"}
    assert found["reference_accuracy"] == 1


def test_an_image_that_cannot_be_encoded_fails_the_task(digits, good, tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONACCEL_FIT", "none")
    monkeypatch.setenv("VISIONACCEL_FALLBACK", "torch_ref")  # not in the place of the backend that is evaluated
    task = write_task(tmp_path, SIZE, OTHER)
    printed = validate(good, "--reference", digits, "--task", task, "--margin", "1", status=1)
    assert "FAILED: 1 of 2 images could not be encoded, the first in line 2: " in printed
    assert "8x12 (height x width in patches)" in printed
    assert "(failed)" in printed


def test_a_task_that_the_reference_cannot_do_says_nothing(digits, good, task, tmp_path):
    (tmp_path / "images").symlink_to(task.parent / "images")
    line = json.loads(task.read_text().splitlines()[0])
    (tmp_path / "task.jsonl").write_text(json.dumps({**line, "answer": "a cat"}))
    printed = validate(good, "--reference", digits, "--task", tmp_path / "task.jsonl", status=1)
    assert "the reference answered no question correctly" in printed


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("digits", "Expecting value"),
        ('{"image": "images/0.png", "question": "?"}', "answer: Field required"),
        ('{"image": "images/0.png", "question": "?", "answer": 3}', "answer: Input should be a valid string"),
        ('{"image": "images/0.png", "question": "?", "answer": "3", "id": 1}', "id: Extra inputs"),
        ('{"image": "images/0.png", "question": "?", "answer": ""}', "answer: String should have at least 1"),
        ('{"image": "../images/0.png", "question": "?", "answer": "3"}', "not a path inside the folder of the task"),
        ('{"image": "/etc/hosts", "question": "?", "answer": "3"}', "not a path inside the folder of the task"),
        ('{"image": "absent.png", "question": "?", "answer": "3"}', "No such file"),
        ('{"image": "task.jsonl", "question": "?", "answer": "3"}', "cannot be read as an image"),
    ],
)
def test_lines_are_checked_before_anything_runs(task, tmp_path, line, reason):
    shutil.copytree(task.parent / "images", tmp_path / "images")
    (tmp_path / "task.jsonl").write_text(f"{task.read_text().splitlines()[0]}\n\n{line}\n")
    with pytest.raises(InputError, match=f"task.jsonl, line 3: .*{reason}"):
        validate("/nowhere", "--reference", "/nowhere", "--task", tmp_path / "task.jsonl")


@pytest.mark.parametrize(("content", "reason"), [(b"\n", "has no questions"), (b"\xff\xfe", "cannot be read")])
def test_a_file_without_lines_is_refused(tmp_path, content, reason):
    (tmp_path / "task.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        validate("/nowhere", "--reference", "/nowhere", "--task", tmp_path / "task.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "t.jsonl", "--threshold", "0.9"], "--threshold does not apply to --task"),
        (["--task", "t.jsonl", "--images", "x"], "--images does not apply to --task"),
        (["--task", "t.jsonl", "--no-write"], "--no-write does not apply to --task"),
        (["--margin", "0.1"], "--margin does not apply to validate without --task"),
        (["--max-tokens", "8"], "--max-tokens does not apply to validate without --task"),
    ],
)
def test_options_that_do_not_apply_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        validate("/nowhere", "--reference", "/nowhere", *arguments)
