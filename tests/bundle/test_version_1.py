"""Bundles whose manifest is of schema version 1 open as they did, and validating them writes version 2."""

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from bundles import document, make_version_1
from towers import random_patches, reference
from visionaccel import open_encoder
from visionaccel.bundle import MANIFEST, SCHEMA_VERSION, ProgramRequest, export_bundle, open_bundle
from visionaccel.checkpoint import Checkpoint
from visionaccel.cli.app import app
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError, UnsupportedArchitectureError

GRID = Grid(1, 10, 18)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """A bundle with every kind of coverage and split."""
    tower = open_tower(tiny)
    bucket = tower.bucket(Grid(1, 20, 22))
    requests = [
        ProgramRequest(FixedGrid(GRID), split_host=True),
        ProgramRequest(bucket, split_host=True),
        ProgramRequest(AnyGrid()),
    ]
    return export_bundle(tower, tmp_path_factory.mktemp("exported") / "bundle", requests)


@pytest.fixture
def old(exported, tmp_path):
    folder = shutil.copytree(exported.folder, tmp_path / "old")
    make_version_1(folder)
    return folder


def edited(folder, change):
    stated = document(folder)
    change(stated)
    (folder / MANIFEST).write_text(json.dumps(stated))


def test_it_states_what_the_bundle_stated(exported, old):
    stated = document(old)
    assert stated["schema_version"] == 1
    assert {"patches", "windows"} <= stated["programs"][1]["coverage"].keys()
    assert stated["programs"][0]["host"]["window_order"] == "grouped"
    opened = open_bundle(old)
    assert opened.manifest == exported.manifest
    assert [program.coverage for program in opened.programs(["onnx"])] == [
        program.coverage for program in exported.programs(["onnx"])
    ]


@pytest.mark.parametrize("grid", [(1, 10, 18), (1, 12, 8), (2, 30, 4)], ids=str)
def test_it_encodes(tiny, old, grid):
    patches = random_patches([grid])
    with open_encoder(open_bundle(old), backend="onnxrt", device="cpu") as encoder:
        ours = encoder.encode(patches, [grid])
    np.testing.assert_allclose(ours, reference(tiny, patches, [grid]), rtol=0, atol=2e-5)


def test_validating_writes_it_back_in_this_version(tiny, exported, old):
    command = ["validate", str(old), "--reference", str(tiny), "--backend", "onnxrt", "--json"]
    assert CliRunner().invoke(app, command).exit_code == 0
    stated = document(old)
    assert stated["schema_version"] == SCHEMA_VERSION == 2
    assert stated["spec"] == exported.tower.spec.document()
    assert stated["certificate"]["passed"]
    assert open_bundle(old).manifest.programs == exported.manifest.programs


def test_a_damaged_one_is_refused_by_its_own_digest(old):
    edited(old, lambda stated: stated["programs"][0]["coverage"].update(grid=[1, 18, 10]))
    with pytest.raises(BundleError, match="does not match its digest"):
        open_bundle(old)


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        (lambda stated: stated.pop("vision_config"), BundleError, "lacks family or vision_config"),
        (lambda stated: stated.update(family="other"), UnsupportedArchitectureError, "unknown tower family 'other'"),
        (lambda stated: stated.update(programs=[3]), BundleError, "is not a manifest"),
        (lambda stated: stated["programs"][1]["coverage"].pop("windows"), BundleError, "digest"),
        (lambda stated: stated.update(spec={}), BundleError, "'spec', which version 1"),
        (lambda stated: stated["programs"][1]["coverage"].update(sizes={}), BundleError, "'sizes', which version 1"),
        (lambda stated: stated["programs"][0]["host"].update(order="plain"), BundleError, "'order', which version 1"),
    ],
    ids=["no configuration", "family", "programs", "windows", "spec", "sizes", "order"],
)
def test_what_is_no_manifest_of_version_1_is_refused(old, change, error, complaint):
    edited(old, change)
    with pytest.raises(error, match=complaint):
        open_bundle(old)


def test_another_configuration_is_refused(tiny, old, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["fullatt_block_indexes"] = [2]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"different vision configurations.*full_blocks"):
        open_bundle(old, checkpoint=Checkpoint(copy))
