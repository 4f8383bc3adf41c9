"""A tower computes the same, on every backend, in whichever form a checkpoint stores its weights."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bundle_tools import DYNAMIC, GRID, encode
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.bundle import (
    ProgramRequest,
    export_bundle,
    open_bundle,
    read_strip_note,
    strip_checkpoint,
    tower_digest,
)
from visionaccel.checkpoint import Checkpoint
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import CheckpointError
from visionaccel_testing.checkpoints import TINY, random_checkpoint

GRIDS = [(1, 10, 18), (2, 12, 16)]
FIXED = [ProgramRequest(FixedGrid(GRID))]
REQUESTS = [*FIXED, ProgramRequest(FixedGrid(GRID), split_host=True), DYNAMIC]


def apart(suffix):
    """Queries, keys and values as three weights with names such as `attn.q` or `attn.q_proj`."""

    def change(tensors):
        for name in [name for name in tensors if ".attn.qkv." in name]:
            for part, values in zip("qkv", np.split(tensors.pop(name), 3), strict=True):
                tensors[name.replace(".qkv.", f".{part}{suffix}.")] = values

    return change


def gate_and_up_joined(tensors):
    """Gate and up as one weight, gate first."""
    for name in [name for name in tensors if ".gate_proj." in name]:
        both = [tensors.pop(name), tensors.pop(name.replace("gate_proj", "up_proj"))]
        tensors[name.replace("gate_proj", "gate_up_proj")] = np.concatenate(both)


FORMS = {"apart": apart(""), "apart_proj": apart("_proj"), "joined": gate_and_up_joined}


@pytest.fixture(scope="module", params=FORMS)
def stored(request, tiny, tmp_path_factory):
    """The tiny checkpoint in another form."""
    return reform(tiny, tmp_path_factory.mktemp("form") / request.param, FORMS[request.param])


def reform(checkpoint, folder, change):
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("backend", "options"),
    [("torch_ref", {}), ("torch_ref", {"implementation": "transformers"}), ("onnxrt", {}), ("openvino", {})],
    ids=["fast", "transformers", "onnxrt", "openvino"],
)
def test_every_form_is_computed_alike(tiny, stored, backend, options):
    patches = random_patches(GRIDS)
    with open_encoder(stored, backend=backend, options=options) as encoder:
        embeddings = np.asarray(encoder.encode(patches, GRIDS), np.float32)
    np.testing.assert_allclose(embeddings, reference(tiny, patches, GRIDS), rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["torch_ref", "onnxrt", "openvino"])
@pytest.mark.parametrize("form", ["kernel as a matrix", "projection transposed", "bias as a column", "apart"])
def test_weights_of_another_layout_are_refused_by_every_backend(tiny, tmp_path, backend, form):
    def change(tensors):
        if form == "kernel as a matrix":
            name = "visual.patch_embed.proj.weight"
            tensors[name] = tensors[name].reshape(len(tensors[name]), -1)
        elif form == "projection transposed":
            tensors["visual.merger.mlp.2.weight"] = np.ascontiguousarray(tensors["visual.merger.mlp.2.weight"].T)
        elif form == "bias as a column":
            tensors["visual.blocks.0.attn.proj.bias"] = tensors["visual.blocks.0.attn.proj.bias"][:, None]
        else:
            apart("")(tensors)
            tensors["visual.blocks.0.attn.k.bias"] = tensors["visual.blocks.0.attn.k.bias"][:, None]

    folder = reform(tiny, tmp_path / "form", change)
    with pytest.raises(CheckpointError, match=r"do not fit the configuration: .* requires"):
        open_encoder(folder, backend=backend)


@pytest.mark.parametrize("self_contained", [False, True])
def test_bundles_are_written_from_every_form(tiny, stored, tmp_path, self_contained):
    patches = random_patches([GRID.thw])
    exact = reference(tiny, patches, [GRID.thw])
    tower = open_tower(stored)
    for number, request in enumerate(REQUESTS):
        bundle = export_bundle(tower, tmp_path / str(number), [request], self_contained=self_contained)
        assert bundle.manifest.weights_digest == tower_digest(open_tower(stored))
        np.testing.assert_allclose(encode(bundle.folder, [GRID.thw], patches), exact, rtol=0, atol=2e-5)


def test_joined_weights_have_the_digest_of_those_apart(tiny, tmp_path):
    """A bundle of the one form serves a checkpoint of the other."""
    joined = reform(tiny, tmp_path / "joined", gate_and_up_joined)
    assert tower_digest(open_tower(joined)) == tower_digest(open_tower(tiny))
    bundle = export_bundle(open_tower(tiny), tmp_path / "bundle", FIXED)
    np.testing.assert_array_equal(encode(open_bundle(bundle.folder, checkpoint=Checkpoint(joined))), encode(bundle))


def test_every_form_is_stripped(stored, tmp_path):
    tensors = {**load_file(stored / "model.safetensors"), "lm_head.weight": np.ones((2, 2), np.float32)}
    whole = shutil.copytree(stored, tmp_path / "whole")
    save_file(tensors, whole / "model.safetensors")
    strip_checkpoint(Checkpoint(whole), tmp_path / "out")
    assert set(Checkpoint(tmp_path / "out").tensors) == {"lm_head.weight"}
    assert read_strip_note(tmp_path / "out") == tower_digest(open_tower(stored))


@pytest.mark.parametrize(("form", "twice"), [("apart", "attn.qkv.weight"), ("joined", "mlp.gate_proj.weight")])
def test_a_weight_in_two_forms_is_refused(tiny, tmp_path, form, twice):
    def change(tensors):
        old = dict(tensors)
        FORMS[form](tensors)
        tensors[f"visual.blocks.0.{twice}"] = old[f"visual.blocks.0.{twice}"]

    folder = reform(tiny, tmp_path / "twice", change)
    with pytest.raises(CheckpointError, match="is stored twice: also as part of"):
        _ = open_tower(folder).weights


def test_a_part_that_is_missing_is_noticed(tiny, tmp_path):
    def change(tensors):
        apart("")(tensors)
        del tensors["visual.blocks.1.attn.k.bias"]

    tower = open_tower(reform(tiny, tmp_path / "incomplete", change))
    assert not tower.complete
    for backend in ("torch_ref", "onnxrt"):
        with (
            pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.(k|qkv)\.bias"),
            open_encoder(tower, backend=backend),
        ):
            pass


def test_full_attention_in_blocks_that_do_not_exist_is_ignored(tmp_path):
    config = {**TINY, "fullatt_block_indexes": [1, 3, 31, -1]}
    folder = random_checkpoint(tmp_path, config)
    assert json.loads((folder / "config.json").read_text())["vision_config"]["fullatt_block_indexes"] == [1, 3, 31, -1]
    patches = random_patches(GRIDS)
    for backend in ("torch_ref", "onnxrt"):
        with open_encoder(folder, backend=backend) as encoder:
            embeddings = np.asarray(encoder.encode(patches, GRIDS), np.float32)
        np.testing.assert_allclose(embeddings, reference(folder, patches, GRIDS), rtol=0, atol=2e-5)
