"""An author's mistakes in a family, as its documentation lists them: each error names the entry, step or weight."""

import json
import shutil
from dataclasses import replace

import pytest

from doc_pages import ROOT, rows
from fake_plugins import find_each_time, install_all
from visionaccel.checkpoint import Checkpoint
from visionaccel.errors import VisionAccelError
from visionaccel.families import GROUP, Tower, family_named, registry, tower_of
from visionaccel.towers import Activation, Linear
from visionaccel_testing.checkpoints import random_checkpoint

PAGE = ROOT / "docs" / "adding-a-family.md"
ARCHITECTURE = "TinyVLMForConditionalGeneration"
CONFIG = {"layers": 2, "width": 32, "heads": 2, "expansion": 2, "patch": 4, "output_width": 24}
_, *ROWS = rows(PAGE)
SAYS = {mistake: said.strip("`") for mistake, said in ROWS}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example's family and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("example")
    site = install_all(folder / "site", "tiny", {GROUP: {ARCHITECTURE: "tinyvlm.family:FAMILY"}}, "")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(site)
        patched.syspath_prepend(ROOT / "examples" / "third_party_family")
        find_each_time(patched, registry._FAMILIES)
        random_checkpoint(folder / "tower", CONFIG, family="tinyvlm", architecture=ARCHITECTURE)
        return family_named("tinyvlm"), folder / "tower"


@pytest.fixture
def tinyvlm(example, tmp_path):
    """The family, and a copy of the checkpoint."""
    family, folder = example
    return family, shutil.copytree(folder, tmp_path / "tower")


def steps(*, up="mlp.up", activation="silu", down=(64, 32)):
    return {"mlp": (Linear(up, 32, 64), Activation(activation), Linear("mlp.down", *down))}


def described(family, **changed):
    return replace(family, spec=lambda config: replace(family.spec(config), **changed))


def configured(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {**config["vision_config"], **entries}
    config["vision_config"] = {name: value for name, value in config["vision_config"].items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(family, folder):
    tower = Tower(family, Checkpoint(folder))
    _ = tower.weights
    tower.onnx_model()


MISTAKES = {
    "the configuration lacks an entry": lambda family, folder: opened(family, configured(folder, width=None)),
    "the configuration asks for something else": lambda family, folder: opened(
        family, configured(folder, activation="relu")
    ),
    "an activation that the spec does not know": lambda family, folder: opened(
        described(family, **steps(activation="relu")), folder
    ),
    "widths of steps that do not follow each other": lambda family, folder: opened(
        described(family, **steps(down=(32, 32))), folder
    ),
    "a prefix that no tensor has": lambda family, folder: opened(replace(family, prefixes=("visual.",)), folder),
    "a misspelt step": lambda family, folder: opened(described(family, **steps(up="mlp.upp")), folder),
    "`names` without the block's modules": lambda family, folder: opened(replace(family, names={}), folder),
    "`names` with another placeholder": lambda family, folder: replace(
        family, names={"layers.{i}.mlp": "blocks.{i}.mlp"}
    ),
    "a size that is not the stored one": lambda family, folder: opened(family, configured(folder, expansion=4)),
    "a bias that the checkpoint does not have": lambda family, folder: opened(
        described(family, embed=(Linear("patch_embedding", 96, 32),)), folder
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_says_what_the_page_says(tinyvlm, mistake):
    with pytest.raises((VisionAccelError, ValueError)) as raised:
        MISTAKES[mistake](*tinyvlm)
    assert SAYS[mistake] in str(raised.value)


def test_an_entry_point_of_another_name_is_not_found(example, tmp_path, monkeypatch):
    _, folder = example
    site = install_all(tmp_path, "tiny", {GROUP: {ARCHITECTURE.upper(): "tinyvlm.family:FAMILY"}}, "")
    monkeypatch.syspath_prepend(site)
    find_each_time(monkeypatch, registry._FAMILIES)
    with pytest.raises(VisionAccelError) as raised:
        tower_of(Checkpoint(folder))
    assert SAYS["the entry point has another name"] in str(raised.value)


def test_every_mistake_of_the_page_is_made():
    assert SAYS.keys() == {*MISTAKES, "the entry point has another name"}
