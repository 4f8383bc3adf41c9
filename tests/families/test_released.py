"""Towers of released sizes: their graphs have the sizes of the configuration and refer to all of the weights."""

import math
import shutil
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest

from towers import random_patches
from visionaccel import open_encoder
from visionaccel.core.grid import Grid
from visionaccel.core.onnx_graphs import ExternalData, is_external
from visionaccel.core.program import AnyGrid, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.families import family_named
from visionaccel.validation import REFERENCE_OPTIONS
from visionaccel_bench.encode.operations import count_operations
from visionaccel_testing.checkpoints import hollow_checkpoint, random_checkpoint

RELEASED = tomllib.loads(Path(__file__).with_name("released.toml").read_text())["tower"]
GRID = Grid(1, 46, 62)
TOKENS = 23 * 31


def hollow_tower(row, folder):
    return open_tower(hollow_checkpoint(folder, row["config"], row["family"]))


def name_of(row):
    return row["name"]


@pytest.fixture(scope="module", params=RELEASED, ids=name_of)
def released(request, tmp_path_factory):
    """A row of the table, and its tower with weights of zeros."""
    return request.param, hollow_tower(request.param, tmp_path_factory.mktemp("released"))


def test_the_description_has_the_released_sizes(released):
    row, spec = released[0], released[1].spec
    last = spec.mlp[-1]
    inner = getattr(last, "down", last).inputs
    found = {"depth": spec.depth, "hidden": spec.hidden, "heads": spec.heads, "inner": inner, "out": spec.out}
    assert (found, list(spec.deepstack)) == (row["sizes"], row.get("deepstack", []))
    assert spec.positions is None or spec.positions.side == (24 if row["family"] == "glm4v" else 48)


@pytest.mark.parametrize("form", ["any grid", "any grid, standard", "fixed grid", "fixed grid, split", "bucket"])
def test_graphs_have_the_signature_and_refer_to_every_byte_of_the_weights(released, form):
    row, tower = released
    coverage = AnyGrid() if form.startswith("any") else FixedGrid(GRID) if "fixed" in form else tower.bucket(GRID)
    split = tower.split(coverage) if "split" in form else None
    dialect = "standard" if "standard" in form else None
    model = onnx.load_model_from_string(tower.onnx_model(coverage=coverage, host=split, dialect=dialect))

    sizes, levels = row["sizes"], 1 + len(row.get("deepstack", []))
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    patches, tokens = ("patches", "tokens") if form.startswith("any") else (GRID.patches, TOKENS)
    if split is None:
        assert shapes["pixel_values"] == [patches, tower.patch_width]
        assert shapes["embeddings"] == [tokens, sizes["out"] * levels]
    else:
        assert shapes["patch_embeddings"] == [tokens, 4, sizes["hidden"]]
        assert shapes["window_embeddings"] == [tokens, sizes["out"] * levels]

    ranges = [ExternalData.of(tensor) for tensor in model.graph.initializer if is_external(tensor)]
    host = [] if split is None else [tower.weights[name].length for name in tower.host_weights]
    stored = 4 * sum(math.prod(shape) for shape in tower.spec.shapes().values())
    assert len({each.offset for each in ranges}) == len(ranges)
    assert sum(each.length for each in ranges) == stored - sum(host)


@pytest.mark.parametrize("row", [row for row in RELEASED if "giga" in row], ids=name_of)
def test_operations_are_those_of_the_arithmetic_by_hand(row, tmp_path):
    tower = hollow_tower(row, tmp_path)
    assert count_operations(tower.spec, [Grid(1, 64, 64)]).total / 1e9 == pytest.approx(row["giga"], abs=1e-3)


@pytest.mark.parametrize("row", [row for row in RELEASED if "cut" in row], ids=name_of)
def test_random_weights_of_the_real_widths_run_on_onnx_runtime(tmp_path, row):
    family = row["family"]
    config = {**family_named(family).defaults, **row["config"], **row["cut"]}
    folder = random_checkpoint(tmp_path / "checkpoint", config, family=family, dtype="bfloat16")
    grids = [(1, 6, 10)]
    patches = random_patches(grids, config)
    with open_encoder(folder, backend="onnxrt", isolation="none") as encoder:
        ours = np.asarray(encoder.encode(patches, grids))
    fast = {**REFERENCE_OPTIONS, "implementation": "fast"}
    options = fast if family == "dots_ocr" else REFERENCE_OPTIONS  # transformers has no class of dots.ocr
    with open_encoder(folder, backend="torch_ref", options=options, isolation="none") as encoder:
        exact = np.asarray(encoder.encode(patches, grids))
    shutil.rmtree(folder)
    assert ours.shape == exact.shape
    assert np.abs(ours - exact).max() <= 1e-5 * np.abs(exact).max()
