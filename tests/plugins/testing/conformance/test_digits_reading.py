"""What the digits model reads through an encoder, which the conformance kit checks."""

import pytest
import torch

from bundles import replace_model, write_bundle
from digits_vlm.samples import held_out_images
from visionaccel import open_encoder
from visionaccel.bundle import open_bundle
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.images import image_processor
from visionaccel.validation import REFERENCE_OPTIONS
from visionaccel_testing.conformance.digits_reading import read_digits


@pytest.fixture
def reference(digits):
    with open_encoder(digits, backend="torch_ref", options=REFERENCE_OPTIONS) as encoder:
        yield encoder


def read(digits, reference, folder, count):
    """What is read through a bundle's programs, by the way of fitting images to them."""
    with open_encoder(open_bundle(folder), backend="onnxrt") as ours:
        return {each.fit: each for each in read_digits(digits, ours, reference, count)}


@pytest.fixture
def fixed(digits, tmp_path):
    """A bundle with programs of two grids."""
    return write_bundle(digits, tmp_path / "bundle", "10x18", "18x10")


def test_fixed_programs_read_images_that_are_fitted_to_them(digits, reference, fixed):
    found = read(digits, reference, fixed, 12)
    assert set(found) == {"natural", "letterbox", "stretch"}
    assert all(each.agreement == 1 and each.images == 12 for each in found.values())
    assert all(each.accuracy > 0.8 for each in found.values())


def test_a_program_for_any_grid_reads_images_of_their_own_size(digits, reference, tmp_path):
    found = read(digits, reference, write_bundle(digits, tmp_path / "bundle", dynamic=True, precision="bfloat16"), 12)
    assert {fit: each.agreement for fit, each in found.items()} == {"natural": 1}


def test_a_program_for_any_grid_next_to_fixed_ones_reads_images_of_their_own_size_too(digits, reference, tmp_path):
    folder = write_bundle(digits, tmp_path / "bundle", "22x32", dynamic=True)
    assert list(read(digits, reference, folder, 6)) == ["natural", "letterbox", "stretch"]


def test_swapped_tables_cost_answers(digits, reference, fixed):
    tower = open_tower(digits)
    for name, other in (("10x18", "18x10"), ("18x10", "10x18")):
        replace_model(fixed, name, tower.onnx_model(coverage=FixedGrid(Grid.parse(other))))
    found = read(digits, reference, fixed, 12)
    assert all(found[fit].agreement < 0.7 for fit in ("letterbox", "stretch"))


def test_an_image_that_fails_is_a_different_answer(digits, reference, fixed, monkeypatch, caplog):
    with open_encoder(open_bundle(fixed), backend="onnxrt") as ours:

        def run(inputs):
            raise MemoryError("out of memory")

        for opened in ours.programs:
            monkeypatch.setattr(opened.session, "run", run)
        found = [each.agreement for each in read_digits(digits, ours, reference, 2)]
    assert found == [1, 0, 0]
    assert "out of memory" in caplog.text


def test_answers_are_those_of_transformers(digits, reference):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(digits, dtype=torch.float32).eval()
    tokenizer, process, right = AutoTokenizer.from_pretrained(digits), image_processor(digits), 0
    samples = held_out_images(8)
    for sample in samples:
        patches, grid = process(sample.image)
        media = "<|vision_start|>" + "<|image_pad|>" * (grid.patches // 4) + "<|vision_end|>"
        text = f"<|im_start|>user\n{media}Read the digits.<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=torch.from_numpy(patches),
            image_grid_thw=torch.tensor([[1, grid.h, grid.w]]),
            max_new_tokens=8,
            do_sample=False,
        )
        right += tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True) == sample.truth
    with open_encoder(digits, backend="onnxrt") as ours:
        (found,) = read_digits(digits, ours, reference, 8)
    assert found.accuracy == right / 8
    assert found.agreement == 1
