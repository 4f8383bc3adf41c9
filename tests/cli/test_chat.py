"""`visionaccel chat`: the model's own answer, by an encoder; and errors before a model is loaded."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from bundles import write_bundle
from visionaccel.bundle import strip_checkpoint
from visionaccel.checkpoint import Checkpoint
from visionaccel.cli.app import app
from visionaccel.errors import CheckpointError, ConfigurationError, InputError, UnsupportedArchitectureError

QUESTION = "Read the digits."
DRIFT = '{"faults": [{"all": true, "do": "drift"}]}'


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture of digits, and the digits."""
    from digits_vlm.samples import held_out_images

    (sample,) = held_out_images(1)
    path = tmp_path_factory.mktemp("pictures") / "digits.png"
    sample.image.save(path)
    return path, sample.truth


@pytest.fixture(scope="module")
def bundle(digits, tmp_path_factory):
    """A bundle with the weights, and one program of a grid that is not the picture's own."""
    return write_bundle(digits, tmp_path_factory.mktemp("bundle") / "bundle", "12x20", self_contained=True)


@pytest.fixture
def changed(digits, tmp_path):
    """Copy the digits checkpoint and change a file in it: `changed(name, change)`, without the file if it is None."""

    def change(name, edit):
        folder = shutil.copytree(digits, tmp_path / "changed")
        file = folder / name
        text = file.read_text()
        file.unlink()
        if edit is not None:
            file.write_text(edit(text))
        return folder

    return change


def chat(*words, **options):
    """Run the command; return what it prints."""
    named = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = CliRunner().invoke(app, ["chat", *map(str, words), *map(str, named)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_answer_is_the_models_own(digits, picture, told):
    path, truth = picture
    answer = json.loads(chat(digits, path, QUESTION, "--compare", "--json", backend="onnxrt"))
    found, own = answer["encoder"], answer["own_tower"]
    assert found["answer"] == own["answer"] == truth
    assert found["tokens"] == own["tokens"]
    assert answer["first_difference"] is None
    assert (found["backend"], found["device"], own["dtype"]) == ("onnxrt", "cpu", "float32")
    assert own["encode_ms"] > 0
    (report,) = (report for report in told.encoded if report.purpose == "request")
    parts = report.check_seconds + report.prepare_seconds + report.run_seconds + report.finish_seconds
    assert found["encode_ms"] >= round(1e3 * parts, 3), "the time is that of the whole encode"


def test_plain_text_is_the_answer_and_what_encoded(digits, picture):
    path, _ = picture
    two = chat(digits, path, path, QUESTION, backend="torch_ref", max_tokens=2).splitlines()
    assert len(two) == 2
    assert re.fullmatch(r"\(torch_ref, cpu: encoded in \d+\.\d ms\)", two[1])


def test_compare_names_the_first_token_that_differs(digits, picture, monkeypatch):
    monkeypatch.setenv("VISIONACCEL_ISOLATION", "none")
    path, truth = picture
    options = {"backend": "simulated", "options": DRIFT}
    answer = json.loads(chat(digits, path, QUESTION, "--compare", "--json", **options))
    found, own, difference = answer["encoder"], answer["own_tower"], answer["first_difference"]
    assert found["simulated"]
    assert own["answer"] == truth != found["answer"]
    before = difference["position"] - 1
    assert found["tokens"][:before] == own["tokens"][:before]
    assert difference["encoder"] != difference["own_tower"]
    assert difference["own_tower"] == truth[before]
    printed = chat(digits, path, QUESTION, "--compare", **options)
    assert f"The answers differ from token {before + 1} on" in printed
    assert f"\n{truth}\n(the model's own tower, float32: " in printed


def test_images_are_fitted_to_a_bundles_programs(digits, picture, bundle, tmp_path):
    path, truth = picture
    strip_checkpoint(Checkpoint(digits), tmp_path / "stripped")
    answer = json.loads(chat(tmp_path / "stripped", path, QUESTION, "--json", backend="onnxrt", bundle=bundle))
    assert answer["encoder"]["fitted_images"] == 1
    assert answer["encoder"]["answer"] == truth
    with pytest.raises(CheckpointError, match="has no vision weights: the model has no tower"):
        chat(tmp_path / "stripped", path, QUESTION, "--compare", backend="onnxrt", bundle=bundle)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{picture}"], "no question was given: the last argument, .*digits.png, is a file"),
        (["{picture}", "{picture}"], "no question was given"),
        ([QUESTION], "no image was given"),
        ([], "no question was given"),
        (["{picture}", "x" * 5000, " "], "no question was given"),
        (
            ["{picture}", "Read", "the", "digits."],
            "Read is not a file. Check its path. Write the question last, in quotes",
        ),
        (["/nowhere/x.png", QUESTION], "/nowhere/x.png is not a file"),
    ],
)
def test_images_come_first_and_the_question_last(picture, words, message):
    with pytest.raises(ConfigurationError, match=message):
        chat("/nowhere", *(word.format(picture=picture[0]) for word in words))


def test_a_file_that_is_not_an_image_is_refused(digits, tmp_path):
    (tmp_path / "notes.txt").write_text("digits")
    with pytest.raises(InputError, match=r"notes\.txt cannot be read as an image"):
        chat(digits, tmp_path / "notes.txt", QUESTION)


@pytest.mark.parametrize(
    ("placeholder", "message"),
    [("<|image_pad|>", "2 instead of 1 image placeholders"), ("<|video_pad|>", "a video placeholder but no video")],
)
def test_a_question_with_a_placeholder_is_refused(digits, picture, placeholder, message):
    with pytest.raises(InputError, match=rf"{message}\. Leave .* out of the question"):
        chat(digits, picture[0], f"{placeholder}?", backend="onnxrt")


def without_template(text):
    return json.dumps({name: value for name, value in json.loads(text).items() if name != "chat_template"})


@pytest.mark.parametrize(
    ("file", "edit", "error", "message"),
    [
        ("chat_template.jinja", None, CheckpointError, "has no chat template"),
        ("chat_template.jinja", lambda _: "{{ raise_exception('no images') }}", CheckpointError, "failed: no images"),
        ("chat_template.jinja", lambda _: "{{ messages[0]['role'] }}", InputError, "0 instead of 1 image placeholders"),
        ("processor_config.json", None, CheckpointError, "the processor of .* cannot be loaded|has no image processor"),
        (
            "config.json",
            lambda text: text.replace("Qwen2_5_VLForConditionalGeneration", "OtherModel"),
            UnsupportedArchitectureError,
            "OtherModel",
        ),
    ],
)
def test_a_checkpoint_that_cannot_answer_is_refused(changed, picture, file, edit, error, message):
    folder = changed(file, edit)
    with pytest.raises(error, match=message):
        chat(folder, picture[0], QUESTION, backend="onnxrt")
