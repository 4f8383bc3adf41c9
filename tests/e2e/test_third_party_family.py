"""A third party's family, as the documentation adds it: installed, tested, exported, validated and served."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from doc_pages import ROOT, Block, blocks, commands
from visionaccel_bench.server import quiet_environment

PAGE = ROOT / "docs" / "adding-a-family.md"
EXAMPLE = ROOT / "examples" / "third_party_family"
TYPED = [block for block in blocks(PAGE) if block.language == "console" and block.mark]
SAID = {"first": 6, "video": 1}
"""Prompts of each part of `ask.py`'s few."""


def run(block: Block, folder: Path, site: Path, checkpoint: Path | None = None) -> list[str]:
    """Type the commands of a block and return what each prints. pip installs into `site`, without a network."""
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
    programs = {
        "pip": ["-m", "pip", "--disable-pip-version-check"],
        "pytest": ["-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder)],
        "visionaccel": ["-c", "from visionaccel.cli import main; main()"],
    }
    printed = []
    for command in commands(block):
        program, *arguments = (str(checkpoint) if word == "path/to/tinyvlm" else word for word in command.words)
        arguments = [str(ROOT / word) if "third_party_family" in word else word for word in arguments]
        given = [sys.executable, *programs[program], *arguments, *(offline if program == "pip" else [])]
        environment = quiet_environment({"PYTHONPATH": str(site), "COLUMNS": "200"})
        done = subprocess.run(given, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        printed.append(done.stdout)
    return printed


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """The folder in which pip installed the example, and what its own tests print."""
    site = tmp_path_factory.mktemp("site")
    _, printed = run(TYPED[0], tmp_path_factory.mktemp("tests"), site)
    return site, printed


@pytest.fixture(scope="module")
def tinyvlm(tested, digits, tmp_path_factory):
    """A checkpoint of the whole model: the digits reader's language model with other logits, and a random tower."""
    folder = tmp_path_factory.mktemp("model") / "tinyvlm"
    shutil.copytree(digits, folder)
    vision = {"layers": 2, "width": 64, "heads": 2, "expansion": 2, "output_width": 128}
    code = (
        "import sys; from pathlib import Path; from visionaccel_testing.checkpoints import random_checkpoint; "
        f"random_checkpoint(Path(sys.argv[1]), {vision}, family='tinyvlm', architecture=sys.argv[2])"
    )
    architecture = "TinyVLMForConditionalGeneration"
    environment = quiet_environment({"PYTHONPATH": str(tested[0])})
    subprocess.run([sys.executable, "-c", code, folder, architecture], env=environment, check=True)
    weights = {
        name.replace("model.", "language.", 1): weight
        for name, weight in load_file(digits / "model.safetensors").items()
        if not name.startswith("visual.")
    }
    # Those of the digits reader would end every answer at once.
    weights["lm_head.weight"] = np.random.default_rng(0).normal(0, 0.25, weights["lm_head.weight"].shape).astype("f4")
    save_file({**weights, **load_file(folder / "model.safetensors")}, folder / "model.safetensors")
    config = json.loads((digits / "config.json").read_text())
    config["text_config"]["model_type"] = "qwen2_vl_text"
    tower = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **tower}))
    return folder


def test_the_page_shows_the_files_of_the_example():
    files = {file.read_text(): file.name for file in EXAMPLE.rglob("*.py")}
    shown = [files.get(block.code) for block in blocks(PAGE) if block.language == "python"]
    assert shown == ["family.py", "reference.py", "test_family.py", "serving.py"]
    package = (EXAMPLE / "pyproject.toml").read_text()
    assert all(block.code in package for block in blocks(PAGE) if block.language == "toml")
    assert len((EXAMPLE / "tinyvlm" / "family.py").read_text().splitlines()) < 100


def test_the_tower_equals_its_own_reference_on_two_backends(tested):
    assert "4 passed" in tested[1]


def test_it_is_explained_exported_and_validated_against_a_reference_that_is_not_independent(tested, tinyvlm, tmp_path):
    explained, _, validated = run(TYPED[1], tmp_path, tested[0], tinyvlm)
    assert "tinyvlm" in explained
    assert "The reference is not independent" in " ".join(validated.split())
    manifest = json.loads((tmp_path / "tinyvlm-bundle" / "visionaccel.json").read_text())
    assert manifest["family"] == "tinyvlm"
    assert len(manifest["programs"]) == 2
    assert (manifest["certificate"]["passed"], manifest["certificate"]["independent"]) == (True, False)


@pytest.fixture(scope="module")
def stock(ask, tested, tinyvlm):
    """The answers of vLLM without a backend, with the model of the example."""
    answers = ask({"PYTHONPATH": str(tested[0])}, part="few", checkpoint=tinyvlm)
    assert answers["status"] == 0, answers["log"][-4000:]
    return answers["parts"]


@pytest.mark.parametrize(("backend", "mode"), [("onnxrt", "pipelined"), ("torch_ref", "inline")])
def test_vllm_answers_as_with_the_models_own_tower(ask, tested, tinyvlm, stock, backend, mode):
    settings = {"PYTHONPATH": str(tested[0]), "VISIONACCEL_BACKEND": backend, "VISIONACCEL_MODE": mode}
    answers = ask(settings, part="few", checkpoint=tinyvlm)
    assert answers["status"] == 0, answers["log"][-4000:]
    assert f"the vision encoder runs on backend {backend!r}" in answers["log"]
    for part, number in SAID.items():
        assert len(stock[part]) == number
        for ours, theirs in zip(answers["parts"][part], stock[part], strict=True):
            assert ours["tokens"] == theirs["tokens"]
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], rel=0, abs=1e-4)
    assert len({tuple(answer["logprobs"]) for answer in stock["first"]}) == 6, "every image has another answer"
