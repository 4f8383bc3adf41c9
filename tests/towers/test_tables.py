"""The host-side tables are transformers' own, for any list of grids."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from strategies import grid_lists
from visionaccel.checkpoint import Checkpoint
from visionaccel.core.grid import as_grids
from visionaccel.families import tower_of
from visionaccel.towers import make_tables
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, TINY, random_checkpoint

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
