"""The digits models: small, honest about their split, and with the traits that make a wrong grid cost accuracy."""

import json

import numpy as np
import pytest

from digits_vlm import checkpoint_path
from digits_vlm.samples import _pool, digits_video, held_out_images
from visionaccel import open_encoder
from visionaccel.core.grid import as_grids
from visionaccel.encoder import open_tower
from visionaccel.towers import window_order
from visionaccel.validation import REFERENCE_OPTIONS

each_family = pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])


def test_no_handwritten_sample_is_in_both_pools():
    train, held_out = (np.unique(_pool(split)[0].reshape(-1, 64), axis=0) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 1797
    assert len(np.unique(np.concatenate([train, held_out]), axis=0)) == 1797


def test_held_out_images_are_reproducible_and_of_many_grids():
    first, more = held_out_images(20), held_out_images(40)
    assert [sample.truth for sample in first] == [sample.truth for sample in more[:20]]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, more, strict=False))
    assert len({sample.image.size for sample in more}) == 40
    assert {len(sample.truth) for sample in more} == {1, 2, 3, 4}


def test_videos_drift_but_keep_their_digits():
    clip = digits_video(np.random.default_rng(5), "held_out")
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape[0] == 4
    assert clip.truth.isdigit()
    assert not np.array_equal(clip.frames[0], clip.frames[-1])


@each_family
def test_a_checkpoint_is_small_and_its_score_recorded(family):
    folder = checkpoint_path(family)
    assert (folder / "model.safetensors").stat().st_size <= 6_000_000
    score = json.loads((folder / "score.json").read_text())
    assert score["held_out_images"] == 300
    assert score["exact_match_transformers"] >= 0.95


def test_an_unknown_family_is_refused_with_those_that_are_included():
    with pytest.raises(ValueError, match="'qwen9_vl' is included; use one of qwen2_5_vl, qwen2_vl, qwen3_vl"):
        checkpoint_path("qwen9_vl")


def test_qwen2_5_vl_has_whole_and_partial_windows_between_full_attention(digits):
    spec = open_tower(digits).spec
    assert 0 < len(spec.full_blocks) < spec.depth
    assert spec.merged == 4
    assert spec.window_patches == 64
    _, lengths = window_order(spec, as_grids([(1, 10, 14)]))
    assert len(lengths) > 1
    assert len(set(lengths.tolist())) > 1, "partial windows"


def test_qwen3_vl_has_two_deepstack_levels_and_positions_for_frames_smaller_and_larger_than_their_table():
    spec = open_tower(checkpoint_path("qwen3_vl")).spec
    sides = {side // spec.patch for sample in held_out_images(40) for side in sample.image.size}
    assert spec.positions is not None
    assert min(sides) < spec.positions.side < max(sides)
    assert len(spec.deepstack) == 2


@each_family
def test_both_backends_agree_on_real_images(family):
    from transformers import AutoImageProcessor

    folder = checkpoint_path(family)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    inputs = processor([sample.image for sample in held_out_images(12)], return_tensors="np")
    patches, grids = np.asarray(inputs["pixel_values"], np.float32), inputs["image_grid_thw"]
    reference = open_encoder(folder, backend="torch_ref", options=REFERENCE_OPTIONS)
    with open_encoder(folder, backend="onnxrt") as ours, reference as exact:
        expected = exact.encode(patches, grids)
        np.testing.assert_allclose(ours.encode(patches, grids), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
