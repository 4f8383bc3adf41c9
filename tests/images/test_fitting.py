"""Images get grids that programs take: their own where it is taken, the nearest in aspect and area where it is not."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, Bucket, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError, InputError, UnfitGridError
from visionaccel.images import Fitter, ImageProcessor, grid_cost, image_processor
from visionaccel_testing.checkpoints import QWEN2_5_VL_7B, hollow_checkpoint

LEAST, MOST = 3136, 12845056
SIDES = st.integers(1, 4000)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """The 7B tower: patches of 14 pixels, windows of 8x8 patches."""
    return open_tower(hollow_checkpoint(tmp_path_factory.mktemp("7b"), QWEN2_5_VL_7B))


@cache
def fixed(*texts):
    return tuple(FixedGrid(Grid.parse(text)) for text in texts)


def fitter(tower, coverages, policy="letterbox", most=MOST):
    return Fitter(tower, tuple(coverages), policy, LEAST, most)


@given(height=SIDES, width=SIDES, bounds=st.sampled_from([(LEAST, MOST), (LEAST, 1003520), (50176, 200704)]))
@example(height=1, width=1, bounds=(LEAST, MOST))
@example(height=1, width=200, bounds=(LEAST, MOST))
@hypothesis_settings(max_examples=300)
def test_the_natural_grid_is_the_processors_own(tower, height, width, bounds):
    assume(max(height, width) <= 200 * min(height, width))
    rows, columns = smart_resize(height, width, 28, *bounds)
    assert Fitter(tower, (), "stretch", *bounds).natural(height, width) == Grid(1, rows // 14, columns // 14)


def test_an_aspect_ratio_that_the_processor_refuses_is_refused(tower):
    with pytest.raises(UnfitGridError, match="aspect ratio"):
        fitter(tower, fixed("58x74")).grid_for(2, 401)
    assert issubclass(UnfitGridError, InputError)


def test_orientation_decides_between_grids_of_one_size(tower):
    both = fitter(tower, fixed("58x74", "74x58"))
    assert both.grid_for(768, 1024) == Grid(1, 58, 74)
    assert both.grid_for(1024, 768) == Grid(1, 74, 58)


def test_area_decides_between_grids_of_one_aspect_ratio(tower):
    sizes = fitter(tower, fixed("16x16", "32x32", "64x64"))
    chosen = {side: sizes.grid_for(side, side).h for side in (60, 224, 300, 448, 500, 900, 3000)}
    assert chosen == {60: 16, 224: 16, 300: 32, 448: 32, 500: 32, 900: 64, 3000: 64}


def test_lost_detail_weighs_more_than_added_area():
    natural = Grid(1, 32, 32)
    smaller, larger = (grid_cost(448, 448, natural, Grid(1, side, side)) for side in (16, 64))
    assert smaller == pytest.approx(2 * larger)
    assert grid_cost(448, 448, natural, natural) == 0


@given(height=SIDES, width=SIDES, policy=st.sampled_from(["letterbox", "stretch"]), mixed=st.booleans())
@example(height=1, width=1, policy="letterbox", mixed=True)
@example(height=1, width=200, policy="letterbox", mixed=True)
@example(height=200, width=1, policy="stretch", mixed=True)
@example(height=100, width=2000, policy="letterbox", mixed=False)
@example(height=4000, width=20, policy="letterbox", mixed=False)
@hypothesis_settings(max_examples=80)
def test_every_image_gets_a_grid_that_a_program_takes_and_keeps_it(tower, height, width, policy, mixed):
    assume(max(height, width) <= 200 * min(height, width))
    coverages = (
        [*fixed("8x24", "16x16", "24x8"), Bucket({"patches": 400, "windows": 12})]
        if mixed
        else [Bucket({"patches": 256, "windows": 4})]
    )
    fit = fitter(tower, coverages, policy)
    fitted = fit.fit(Image.new("RGB", (width, height)))
    rows, columns = smart_resize(fitted.height, fitted.width, 28, LEAST, MOST)
    grid = Grid(1, rows // 14, columns // 14)
    assert any(tower.fits(coverage, grid) for coverage in coverages)
    assert grid == fit.grid_for(height, width)
    assert fit.grid_for(fitted.height, fitted.width) == grid
    assert grid.patches <= fit.largest.patches
    again = fit.fit(fitted)
    assert again.size == fitted.size
    assert np.array_equal(again, fitted)


def test_an_image_whose_own_grid_fits_a_bucket_is_left_to_the_processor(tower):
    image = Image.new("RGB", (300, 200))
    fit = fitter(tower, [tower.bucket(Grid(1, 32, 32))])
    assert fit.fit(image) is image
    assert fit.grid_for(200, 300) == Grid(1, 14, 22)
    # 24x36 fills 15 of its 16 windows; the next larger grid of that aspect ratio, 26x38, would need 20.
    assert fit.fit(Image.new("RGB", (3000, 2000))).size == (36 * 14, 24 * 14)


def test_a_banner_gets_the_longest_line_of_a_bucket(tower):
    fit = fitter(tower, [tower.bucket(Grid(1, 16, 16))])
    assert fit.grid_for(100, 2000) == Grid(1, 2, 32)
    assert fit.grid_for(2000, 100) == Grid(1, 32, 2)


def test_an_image_whose_own_grid_is_a_programs_is_left_to_the_processor(tower):
    image = Image.new("RGB", (231, 110))  # 8x16 patches and a few pixels
    assert fitter(tower, fixed("8x16", "16x8")).fit(image) is image


def test_programs_that_no_image_can_get_are_refused(tower):
    with pytest.raises(ConfigurationError, match="2x2 needs images of 784 pixels"):
        fitter(tower, fixed("2x2")).check_bounds()
    with pytest.raises(ConfigurationError, match="up to 12 patches"):
        fitter(tower, [Bucket({"patches": 12, "windows": 1})]).check_bounds()
    with pytest.raises(UnfitGridError, match="is empty"):
        fitter(tower, fixed("8x8")).grid_for(0, 30)


def test_nothing_changes_where_a_program_takes_every_grid(tower):
    image = Image.new("RGB", (3001, 2003))
    assert fitter(tower, [*fixed("8x8"), AnyGrid()]).fit(image) is image


def test_the_largest_grid_is_the_one_with_most_tokens_that_an_image_can_get(tower):
    assert fitter(tower, fixed("58x74", "16x16")).largest == Grid(1, 58, 74)
    assert fitter(tower, [tower.bucket(Grid(1, 58, 74))]).largest.tokens(2) == 29 * 37
    assert fitter(tower, [tower.bucket(Grid(1, 58, 74))], most=448 * 448).largest == Grid(1, 32, 32)
    # 4 windows of 16 tokens, and room for 90: no grid of 9x10 tokens, nor any other of 65 or more, has so few windows.
    assert fitter(tower, [Bucket({"patches": 360, "windows": 4})]).largest == Grid(1, 16, 16)


def test_stretching_fills_the_grid(tower):
    image = Image.fromarray(np.tile(np.linspace(0, 255, 100, dtype=np.uint8)[:, None, None], (1, 300, 3)))
    fitted = np.asarray(fitter(tower, fixed("16x16"), "stretch").fit(image))
    assert fitted.shape == (224, 224, 3)
    assert fitted[0].mean() < 5
    assert fitted[-1].mean() > 250


def test_letterboxing_keeps_the_aspect_ratio_and_pads_below_or_beside(tower):
    ground, square = (30, 60, 90), (250, 200, 150)
    image = Image.new("RGB", (400, 100), ground)
    image.paste(square, (150, 25, 200, 75))
    fitted = np.asarray(fitter(tower, fixed("16x16")).fit(image))
    scale = 224 / 400
    assert fitted.shape == (224, 224, 3)
    # What is padded has the ground's colour, so the square is all that stands out, at its place times one factor.
    rows, columns = np.nonzero(np.abs(fitted.astype(int) - ground).sum(axis=2) > 150)
    corners = [columns.min(), columns.max() + 1, rows.min(), rows.max() + 1]
    assert corners == pytest.approx([150 * scale, 200 * scale, 25 * scale, 75 * scale], abs=1.5)
    assert np.abs(fitted[60:].astype(int) - ground).max() <= 1


def test_a_pixel_is_padded_with_its_own_colour(tower):
    fitted = np.asarray(fitter(tower, fixed("8x24")).fit(Image.new("RGB", (1, 1), (10, 20, 30))))
    assert (fitted == (10, 20, 30)).all()


@pytest.mark.parametrize("policy", ["letterbox", "stretch"])
@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_an_image_of_another_mode_is_fitted_as_its_rgb_version(tower, mode, policy):
    image, fit = picture(90, 200).convert(mode), fitter(tower, fixed("8x24"), policy)
    assert np.array_equal(fit.fit(image), fit.fit(image.convert("RGB")))


def picture(height, width):
    """A picture with flat parts, edges and noise."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 9, width // 9, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST)).astype(int)
    return Image.fromarray((pixels + rng.integers(-24, 25, pixels.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", [Qwen2VLImageProcessorPil, Qwen2VLImageProcessor])
@pytest.mark.parametrize("policy", ["letterbox", "stretch"])
def test_the_processor_keeps_the_grid_of_what_was_fitted(tower, kind, policy):
    process = ImageProcessor(kind(size={"shortest_edge": LEAST, "longest_edge": 300_000}))
    fit = Fitter(tower, fixed("8x16", "16x8"), policy, process.min_pixels, process.max_pixels)
    for image in (picture(90, 200), picture(200, 90), picture(112, 224), picture(110, 231), picture(40, 41)):
        fitted = fit.fit(image)
        patches, grid = process(fitted)
        assert grid == fit.grid_for(image.height, image.width)
        if fitted is not image:  # it has its size already, and is not resized again
            assert np.array_equal(patches, process(fitted, resize=False)[0])


def test_programs_for_every_grid_leave_the_size_to_the_processor(tower):
    process = ImageProcessor(Qwen2VLImageProcessorPil(size={"shortest_edge": LEAST, "longest_edge": 300_000}))
    fit = Fitter(tower, (AnyGrid(), *fixed("8x16")), "letterbox", process.min_pixels, process.max_pixels)
    for image in (picture(90, 200), picture(110, 231)):
        patches, grid = process(fit.fit(image))
        theirs, expected = process(image)
        assert grid == expected
        assert np.array_equal(patches, theirs)


def test_an_unknown_policy_is_refused(tower):
    with pytest.raises(ConfigurationError, match="unknown policy 'strech'"):
        fitter(tower, fixed("8x16"), "strech").fit(picture(90, 200))


@pytest.mark.parametrize("wrong", [np.zeros((4, 4, 3), np.uint8), None, "x.png", Image.new("La", (30, 30))])
def test_what_is_not_an_image_is_an_input_error(wrong):
    with pytest.raises(InputError, match="cannot be read"):
        ImageProcessor(Qwen2VLImageProcessorPil())(wrong)


def test_a_backend_that_transformers_lacks_is_refused(digits, monkeypatch):
    import transformers

    other = SimpleNamespace(from_pretrained=lambda folder, backend: Qwen2VLImageProcessorPil())
    monkeypatch.setattr(transformers, "AutoImageProcessor", other)
    with pytest.raises(ConfigurationError, match="no torchvision image processor"):
        image_processor(digits, backend="torchvision")
