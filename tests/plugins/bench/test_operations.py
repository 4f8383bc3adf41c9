"""The operations formula, against what torch counts while transformers' tower runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from towers import random_patches, reference
from visionaccel.core.grid import Grid
from visionaccel.encoder import open_tower
from visionaccel_bench.encode.operations import count_operations
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, TINY_TOWERS, hollow_checkpoint, random_checkpoint


@pytest.mark.parametrize("family", sorted(TINY_TOWERS.keys() - {"dots_ocr"}))  # of which transformers has no class
@pytest.mark.parametrize("grids", [[(1, 8, 8)], [(1, 12, 20)], [(3, 6, 10)], [(1, 10, 26), (2, 4, 8)]])
def test_the_formula_counts_what_the_reference_computes(tmp_path, family, grids):
    folder = random_checkpoint(tmp_path, family=family)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(folder, random_patches(grids, TINY_TOWERS[family]), grids)
    counted = count_operations(open_tower(folder).spec, [Grid(*grid) for grid in grids]).total
    assert counted == counter.get_total_flops()


def test_the_parts_of_the_7b_tower(tmp_path):
    found = count_operations(open_tower(hollow_checkpoint(tmp_path, QWEN2_5_VL_7B)).spec, [Grid(1, 58, 74)])
    tera = {
        "linears": sum(product.operations for product in found.linears) / 1e12,
        "full attention": found.full_attention / 1e12,
        "window attention": found.window_attention / 1e12,
        "merger": sum(product.operations for product in found.merger) / 1e12,
        "patch embedding": found.patch_embedding / 1e12,
    }
    rounded = {name: round(value, 2) for name, value in tera.items()}
    assert rounded == {
        "linears": 5.41,
        "full attention": 0.38,
        "window attention": 0.04,
        "merger": 0.10,
        "patch embedding": 0.01,
    }
    assert found.total / 1e12 == pytest.approx(5.93, abs=0.01)
    assert found.full_attention_share == pytest.approx(found.full_attention / found.total)


def test_only_full_attention_grows_with_the_square(tmp_path):
    spec = open_tower(hollow_checkpoint(tmp_path, QWEN2_5_VL_7B)).spec
    small, large = (count_operations(spec, [Grid(1, side, side)]) for side in (16, 32))
    assert large.full_attention == 16 * small.full_attention
    assert large.total - large.full_attention == 4 * (small.total - small.full_attention)


def test_frames_of_a_video_do_not_attend_to_each_other(tiny):
    spec = open_tower(tiny).spec
    assert count_operations(spec, [Grid(3, 8, 8)]).total == 3 * count_operations(spec, [Grid(1, 8, 8)]).total
