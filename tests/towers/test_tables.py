"""The host-side tables are transformers' own, for any list of grids."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from strategies import grid_lists
from towers import transformers_tower
from visionaccel.checkpoint import Checkpoint
from visionaccel.core.grid import as_grids
from visionaccel.encoder import open_tower
from visionaccel.families import tower_of
from visionaccel.towers import make_tables
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, TINY, hollow_checkpoint, random_checkpoint

SHAPES = {"7b": QWEN2_5_VL_7B, "wide windows": {**QWEN2_5_VL_7B, "window_size": 168}, "tiny": TINY}


@pytest.fixture(scope="module", params=SHAPES)
def tower(request, tmp_path_factory):
    """A configuration as this package and as transformers read it."""
    # The shape is read from config.json; the weights do not matter, so a shallow tower is written.
    config = {**SHAPES[request.param], "depth": 1, "fullatt_block_indexes": [0], "intermediate_size": 8}
    folder = random_checkpoint(tmp_path_factory.mktemp("config"), config)
    return tower_of(Checkpoint(folder)).spec, Qwen2_5_VLVisionConfig(**config)


@given(triples=grid_lists(most_side=14))
@example(triples=[(1, 58, 74)])
@example(triples=[(1, 74, 58)])
@example(triples=[(1, 2, 2)])
@example(triples=[(1, 2, 200), (1, 200, 2)])
@example(triples=[(3, 10, 18), (1, 8, 8), (2, 16, 16)])
@hypothesis_settings(max_examples=120)
def test_tables_equal_transformers(tower, triples):
    spec, theirs = tower
    grid_thw = torch.tensor(triples)
    tables = make_tables(spec, as_grids(triples, 2))

    window_index, cu_window = get_vision_window_index(grid_thw, 2, theirs.window_size, theirs.patch_size)
    np.testing.assert_array_equal(tables["window_index"], window_index.numpy())
    np.testing.assert_array_equal(tables["reverse_index"], torch.argsort(window_index).numpy())
    np.testing.assert_array_equal(tables["window_lengths"], np.diff(cu_window.numpy()))
    np.testing.assert_array_equal(tables["frame_lengths"], np.diff(get_vision_cu_seqlens(grid_thw).numpy()))

    positions = get_vision_position_ids(grid_thw, 2)
    cos, sin = Qwen2_5_VLVisionRotaryEmbedding(theirs)(torch.zeros(1), positions)
    half = cos.shape[1] // 2
    for ours, reference in ((tables["rotary_cos"], cos), (tables["rotary_sin"], sin)):
        reordered = reference.reshape(-1, 4, 2 * half)[window_index].reshape(-1, 2 * half).numpy()
        np.testing.assert_array_equal(reordered[:, :half], reordered[:, half:])
        # One unit in the last place of the largest angle is all that two float32 implementations may differ by.
        np.testing.assert_allclose(ours, reordered[:, :half], rtol=0, atol=2e-7 * max(max(t[1:]) for t in triples))


@given(triples=grid_lists())
@hypothesis_settings(max_examples=60)
def test_padded_windows_hold_every_row_once_in_order(tower, triples):
    spec, _ = tower
    tables = make_tables(spec, as_grids(triples, 2))
    rows = sum(t * h * w for t, h, w in triples)
    mask = tables["window_mask"].astype(bool)
    assert tables["window_patches"].shape[1] == spec.window_patches
    np.testing.assert_array_equal(tables["window_patches"][mask], np.arange(rows))
    np.testing.assert_array_equal(mask.sum(axis=1), tables["window_lengths"])
    np.testing.assert_array_equal(tables["window_patches"].ravel()[tables["window_slots"]], np.arange(rows))
    np.testing.assert_array_equal(tables["window_index"][tables["reverse_index"]], np.arange(rows // 4))


OTHERS = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
}
"""Families without windows, with every kind of learned positions, and transformers' models of them."""


@pytest.fixture(scope="module", params=OTHERS)
def full_size(request, tmp_path_factory):
    """The description of a tower with transformers' default sizes, and transformers' class."""
    folder = hollow_checkpoint(tmp_path_factory.mktemp(request.param), {}, request.param)
    return open_tower(folder).spec, transformers_tower(OTHERS[request.param])


@given(triples=grid_lists(most_side=26))
@example(triples=[(1, 2, 2)])
@example(triples=[(2, 48, 48), (1, 96, 48), (1, 24, 26)])
@example(triples=[(1, 2, 200), (4, 200, 2)])
@hypothesis_settings(max_examples=60)
def test_tables_of_learned_and_rotary_positions_equal_transformers(full_size, triples):
    spec, kind = full_size
    grid_thw = torch.tensor(triples)
    tables = make_tables(spec, as_grids(triples, 2))
    np.testing.assert_array_equal(tables["frame_lengths"], np.diff(get_vision_cu_seqlens(grid_thw).numpy()))
    rotary = next(
        each for name, each in vars(sys.modules[kind.__module__]).items() if name.endswith("VisionRotaryEmbedding")
    )
    cos, sin = rotary(kind.config_class())(torch.zeros(1), get_vision_position_ids(grid_thw, 2))
    half, largest = spec.head_dim // 2, max(max(each[1:]) for each in triples)
    for ours, theirs in ((tables["rotary_cos"], cos.numpy()), (tables["rotary_sin"], sin.numpy())):
        np.testing.assert_array_equal(theirs[:, :half], theirs[:, half:])
        np.testing.assert_allclose(ours, theirs[:, :half], rtol=0, atol=2e-7 * largest)
    learned = spec.positions
    if learned is None:
        assert not {"position_index", "position_weight"} & tables.keys()
        return
    index, weight = get_vision_interpolation_indices_and_weights(
        grid_thw, learned.side, learned.mode, learned.align_corners, 2
    )
    np.testing.assert_array_equal(tables["position_index"], index.numpy().T)
    np.testing.assert_allclose(tables["position_weight"][:, :, 0], weight.numpy().T, rtol=0, atol=1e-6)
