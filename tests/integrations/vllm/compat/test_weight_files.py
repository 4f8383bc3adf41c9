"""In vLLM the encoder is read from the files that vLLM loads, fetched once and to where vLLM is told to."""

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hub_server import ATTRIBUTES, HubServer, Repository
from visionaccel.bundle import STRIP_NOTE, tower_digest
from visionaccel.encoder import open_tower
from visionaccel.errors import CheckpointError, ConfigurationError
from visionaccel_bench.server import quiet_environment
from visionaccel_testing.checkpoints import random_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    from vllm.config.load import LoadConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, DefaultModelLoader

    from visionaccel.integrations.vllm.compat import engine_config, weight_files
    from visionaccel.integrations.vllm.encoder_source import open_served_source
    from visionaccel.settings import load_settings

pytestmark = pytest.mark.filterwarnings("ignore")

REPOSITORY = "someone/digits"
SERVE = """
import json, os, sys
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from visionaccel.bundle import tower_digest
from visionaccel.integrations.vllm.compat import engine_config
from visionaccel.integrations.vllm.encoder_source import open_served_source
from visionaccel.settings import load_settings
revision, folder = sys.argv[1:]
engine = EngineArgs(model="someone/digits", revision=revision, download_dir=folder, dtype="float32", max_model_len=512)
config = engine.create_engine_config()
tower = open_served_source(engine_config.served_by(config.model_config), load_settings())
found = {"digest": tower_digest(tower), "files": [str(file) for file in tower.checkpoint.files]}
get_model_loader(config.load_config).download_model(config.model_config)
print("FOUND", json.dumps(found))
"""
"""Opens the encoder as vLLM's processes do, from a model configuration alone, and lets vLLM fetch its model."""


def test_weights_of_a_repository_are_fetched_once_and_into_the_folder_that_vllm_has_for_them(digits, tmp_path):
    with HubServer() as hub:
        hub.repositories[REPOSITORY] = repository = Repository(private=False)
        other = random_checkpoint(tmp_path / "other")
        repository.commit("main", {path.name: path.read_bytes() for path in other.iterdir()})
        files = {path.name: path.read_bytes() for path in digits.iterdir() if path.is_file()}
        revision = repository.commit("wanted", {".gitattributes": ATTRIBUTES, **files})
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "VISIONACCEL_BACKEND": "torch_ref",
        }
        done = subprocess.run(
            [sys.executable, "-c", SERVE, "wanted", str(tmp_path / "weights")],
            env=quiet_environment(environment), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
        assert lines, done.stdout[-2000:] + done.stderr[-4000:]
        fetched = [request for request in hub.requests if request.startswith("GET") and ".safetensors" in request]
    found = json.loads(lines[0])
    assert found["digest"] == tower_digest(open_tower(digits))
    assert all(Path(file).is_relative_to(tmp_path / "weights") for file in found["files"])
    assert not list((tmp_path / "home").rglob("*.safetensors")), "nothing is fetched a second time, elsewhere"
    assert len([request for request in fetched if revision in request or "/wanted/" in request]) == len(fetched) == 1


@pytest.fixture
def config(digits):
    """An engine's configuration, as the hook in vLLM leaves it."""
    made = EngineArgs(model=str(digits), dtype="float32", max_model_len=512, download_dir="/weights")
    return made.create_engine_config()


def test_how_a_model_is_loaded_goes_along_to_processes_that_get_its_configuration_alone(config):
    weight_files.remember_load_config(config)
    for model in (config.model_config, pickle.loads(pickle.dumps(config)).model_config):
        assert engine_config.served_by(model).load.download_dir == "/weights"
    assert engine_config.served_model(config).load is config.load_config


def test_the_files_are_those_that_vllm_loads_whatever_else_lies_there(digits, tmp_path, config):
    """With an index, vLLM does not read a `model.safetensors` that the index does not name."""
    folder = Path(shutil.copytree(digits, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    for number in range(2):
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        save_file(part, folder / f"part-{number}.safetensors")
    save_file({name: values * 2 for name, values in tensors.items()}, folder / "model.safetensors")
    weight_map = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(sorted(tensors))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    parts = tuple(folder / f"part-{number}.safetensors" for number in range(2))
    assert weight_files.weight_files(str(folder), None, config.load_config) == parts
    assert weight_files.weight_files(str(folder), None, LoadConfig(load_format="dummy")) == parts
    config.model_config.model = str(folder)
    source = open_served_source(engine_config.served_by(config.model_config), load_settings())
    assert tower_digest(source) == tower_digest(open_tower(digits))


@pytest.mark.parametrize(("name", "said"), [("pytorch_model.bin", "not a safetensors file"), (None, "no weights")])
def test_weights_that_are_not_in_safetensors_files_are_refused(tmp_path, name, said):
    if name is not None:
        (tmp_path / name).write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match=said):
        weight_files.weight_files(str(tmp_path), None, None)


@pytest.mark.parametrize("noted", ["bundle", "served"])
def test_the_vision_weights_that_are_served_count_and_not_a_note_that_was_left_over(
    digits, tmp_path, monkeypatch, config, noted
):
    """A stripped checkpoint into whose folder a whole one was put keeps the note of what had been taken out."""
    folder = Path(shutil.copytree(digits, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: values * np.float32(2) for name, values in tensors.items()}, folder / "model.safetensors")
    of = {"bundle": digits, "served": folder}[noted]
    note = {"vision_weights_digest": tower_digest(open_tower(of))}
    (folder / STRIP_NOTE).write_text(json.dumps(note))
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(digits))
    config.model_config.model = str(folder)
    refusal, said = (
        (CheckpointError, f"contains vision weights, but not those that were removed according to its {STRIP_NOTE}")
        if noted == "bundle"
        else (ConfigurationError, "was made from different vision weights than those of")
    )
    with pytest.raises(refusal, match=said):
        open_served_source(engine_config.served_model(config), load_settings())


class DerivedLoader(DefaultModelLoader):
    """A plug-in's loader, which may read its weights anywhere."""


def test_other_loaders_than_the_default_are_refused_because_their_files_are_not_known(tiny, monkeypatch):
    monkeypatch.setitem(_LOAD_FORMAT_TO_MODEL_LOADER, "derived", DerivedLoader)
    for name in ("auto", "dummy", "fastsafetensors", "hf", "instanttensor", "safetensors"):
        assert weight_files.weight_files(str(tiny), None, LoadConfig(load_format=name)) == (tiny / "model.safetensors",)
    others = {"derived", "modelexpress", "runai_streamer", "runai_streamer_sharded", "sharded_state", "tensorizer"}
    assert others < set(_LOAD_FORMAT_TO_MODEL_LOADER)
    for name, loader in _LOAD_FORMAT_TO_MODEL_LOADER.items():
        if name != "dummy" and loader is not DefaultModelLoader:
            with pytest.raises(ConfigurationError, match=f"--load-format {name}[ :,]"):
                weight_files.weight_files(str(tiny), None, LoadConfig(load_format=name))


def test_weights_from_elsewhere_are_refused_with_a_bundle_too(digits, monkeypatch, config):
    config.load_config.load_format = "runai_streamer"
    config.model_config.model_weights = "s3://other/model"
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(digits))
    with pytest.raises(ConfigurationError, match="--load-format runai_streamer"):
        open_served_source(engine_config.served_model(config), load_settings())


MODELSCOPE = """
from pathlib import Path
def snapshot_download(model_id, cache_dir=None, revision=None, **_):
    Path({log!r}).open("a").write(f"{{model_id}} {{revision}}\\n")
    return {folder!r}
"""


def test_modelscope_is_asked_where_vllm_asks_it(tmp_path, tiny, monkeypatch):
    """vLLM's client of it is not installed here; a stand-in writes down what it was asked for."""
    client = tmp_path / "site" / "modelscope" / "hub"
    client.mkdir(parents=True)
    for package in (client.parent, client):
        (package / "__init__.py").touch()
    log = tmp_path / "asked"
    (client / "snapshot_download.py").write_text(MODELSCOPE.format(log=str(log), folder=str(tiny)))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    assert weight_files.weight_files("someone/tiny", "v1", None) == (tiny / "model.safetensors",)
    assert weight_files.settings_folder("someone/tiny", "v1") == tiny
    assert set(log.read_text().splitlines()) == {"someone/tiny v1"}
