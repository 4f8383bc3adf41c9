"""Patches of a known grid are those of the Hugging Face processor, bit by bit, of whatever image."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError, GridError, InputError, UnfitGridError
from visionaccel.images import Fitter, ImageProcessor, natural_grid
from visionaccel_bench.serve.fixed_grid import (
    FixedGridProcessor,
    fixed_grid_processor,
    levels_of,
    read_levels,
)

LIMITS = {"shortest_edge": 3136, "longest_edge": 300000}
PATCHES = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
OTHER = {
    "image_mean": [0.5, 0.3, 0.1],
    "image_std": [0.5, 0.25, 0.7],
    "patch_size": 6,
    "merge_size": 3,
    "temporal_patch_size": 3,
}
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16")
SIDES = st.one_of(st.integers(1, 60), st.integers(1, 700))
BACKENDS = {"pil": Qwen2VLImageProcessorPil, "torchvision": Qwen2VLImageProcessor}
LEVEL = 1 / 255 / min(BACKENDS["pil"]().image_std)
"""What a grey level is worth in patches, in the channel where it is worth most."""


def hugging_face(backend, **settings):
    return BACKENDS[backend](**{"size": LIMITS, **settings})


@pytest.fixture(scope="module")
def processors():
    return {backend: ImageProcessor(hugging_face(backend)) for backend in BACKENDS}


@pytest.fixture(scope="module")
def tower(digits):
    return open_tower(digits)


def picture(height, width, mode="RGB", seed=0, noise=24):
    """A picture with flat parts, edges and noise, in any of Pillow's modes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(1, height // 9), max(1, width // 9), 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST)).astype(int)
    pixels = (pixels + rng.integers(-noise, noise + 1, pixels.shape)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(pixels[..., 0]))
    return image if image.mode == mode else image.convert(mode)


def difference(ours, theirs):
    """Largest difference in grey levels, and the share of values that are equal."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    return np.abs(ours - theirs).max() / LEVEL, (ours == theirs).mean()


@given(
    height=SIDES,
    width=SIDES,
    mode=st.sampled_from(MODES),
    backend=st.sampled_from(sorted(BACKENDS)),
    noise=st.sampled_from([0, 24, 255]),
)
@example(height=1, width=1, mode="L", backend="pil", noise=0)
@example(height=1, width=1, mode="RGBA", backend="torchvision", noise=0)
@example(height=3, width=600, mode="RGB", backend="torchvision", noise=255)
@example(height=600, width=3, mode="RGB", backend="pil", noise=255)
@example(height=699, width=501, mode="RGB", backend="pil", noise=255)
@example(height=699, width=501, mode="RGB", backend="torchvision", noise=255)
@hypothesis_settings(max_examples=120)
def test_an_image_at_its_own_grid_gets_the_processors_patches(processors, height, width, mode, backend, noise):
    assume(max(height, width) <= 200 * min(height, width))
    image = picture(height, width, mode, seed=height * 1000 + width, noise=noise)
    inputs = hugging_face(backend)(images=[image.convert("RGB")], return_tensors="pt")
    ours = FixedGridProcessor(processors[backend], inputs["image_grid_thw"][0])([image])
    furthest, equal = difference(ours, inputs["pixel_values"].numpy())
    assert furthest == 0
    assert equal == 1


@given(
    height=SIDES,
    width=SIDES,
    mode=st.sampled_from(MODES),
    grid=st.sampled_from([Grid(1, 16, 16), Grid(1, 8, 24), Grid(1, 24, 10)]),
    policy=st.sampled_from(["letterbox", "stretch"]),
    backend=st.sampled_from(sorted(BACKENDS)),
)
@example(height=1, width=200, mode="RGB", grid=Grid(1, 24, 10), policy="letterbox", backend="pil")
@example(height=224, width=224, mode="RGB", grid=Grid(1, 16, 16), policy="letterbox", backend="torchvision")
@hypothesis_settings(max_examples=120)
def test_any_other_image_gets_the_processors_patches_of_the_fitted_image(
    tower, processors, height, width, mode, grid, policy, backend
):
    assume(max(height, width) <= 200 * min(height, width))
    process, image = processors[backend], picture(height, width, mode, seed=height + width)
    fitter = Fitter(tower, (FixedGrid(grid),), policy, process.min_pixels, process.max_pixels)
    theirs, given_grid = process(fitter.fit(image.convert("RGB")))
    assert given_grid == grid
    assert np.array_equal(FixedGridProcessor(process, grid, policy)([image]), theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings",
    [
        OTHER,
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"patch_size": 16, "temporal_patch_size": 1},
    ],
)
def test_every_configuration_of_the_processor_is_followed(backend, settings):
    image = picture(200, 310)
    processor = hugging_face(backend, **{**PATCHES, **settings})
    inputs = processor(images=[image], return_tensors="pt")
    ours = FixedGridProcessor(ImageProcessor(processor), inputs["image_grid_thw"][0])([image])
    assert np.array_equal(ours, inputs["pixel_values"].numpy())


def test_the_two_processors_of_transformers_differ_by_more_than_a_level(processors):
    """Why each has its own way to resize: what equals one of them is not within a grey level of the other."""
    image, answers = picture(343, 758, noise=255), []
    for process in processors.values():
        grid = natural_grid(343, 758, 28, process.min_pixels, process.max_pixels, 2)
        answers.append(FixedGridProcessor(process, grid)([image]))
    furthest, _ = difference(*answers)
    assert furthest > 1.5


def test_images_of_a_call_follow_each_other(processors):
    process = FixedGridProcessor(processors["pil"], (1, 8, 12))
    images = [picture(50, 100), picture(333, 222, "L"), picture(112, 168)]
    together = process(images)
    assert together.shape == (3 * 96, 1176)
    assert together.flags.c_contiguous
    assert np.array_equal(together, np.concatenate([process([image]) for image in images]))


def test_threads_may_share_a_processor(processors):
    process = FixedGridProcessor(processors["pil"], (1, 8, 12))
    images = [picture(60 + 10 * seed, 200, seed=seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda image: process([image]), images))
    assert np.array_equal(np.concatenate(answers), process(images))


@pytest.mark.parametrize("size", [(112, 168), (90, 300)])
def test_images_stay_as_they_were_and_patches_are_the_callers(processors, size):
    process, image = FixedGridProcessor(processors["pil"], (1, 8, 12)), picture(*size)
    before = image.tobytes()
    patches = process([image])
    kept = patches.copy()
    assert patches.flags.owndata or patches.base.flags.owndata
    patches[:] = np.nan
    assert image.tobytes() == before
    assert np.array_equal(process([image]), kept)
    other = process([picture(*size, seed=5)])
    assert not np.shares_memory(patches, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_that_changes_shows_in_its_patch_alone(processors, backend):
    process = FixedGridProcessor(processors[backend], (1, 8, 12))
    pixels = np.asarray(picture(112, 168)).copy()
    before = process([Image.fromarray(pixels)])
    pixels[30, 100, 1] ^= 255
    rows, columns = np.nonzero(process([Image.fromarray(pixels)]) != before)
    # Patch row 2, column 7: the second row of tokens, its fourth token of six, and there the right upper patch.
    assert set(rows) == {(6 + 3) * 4 + 1}
    assert list(columns) == [(1 * 2 + frame) * 196 + 2 * 14 + 2 for frame in range(2)]


def test_damaged_and_missing_images_are_input_errors(processors, tmp_path):
    process = FixedGridProcessor(processors["pil"], (1, 8, 12))
    file = tmp_path / "cut.png"
    picture(200, 300).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    with Image.open(file) as cut, pytest.raises(InputError, match="cannot be read"):
        process([cut])
    for wrong in ([np.zeros((4, 4, 3), np.uint8)], [None], ["x.png"], [Image.new("La", (30, 30))]):
        with pytest.raises(InputError, match="cannot be read"):
            process(wrong)
    for none in ([], picture(20, 20), None):
        with pytest.raises(InputError, match="no sequence of images"):
            process(none)
    with pytest.raises(UnfitGridError, match="aspect ratio"):
        process([picture(1, 201)])
    with pytest.raises(UnfitGridError, match="is empty"):
        process([Image.new("RGB", (0, 30))])


def test_grids_that_no_image_can_get_are_refused(processors):
    with pytest.raises(GridError, match="divisible by the merge size"):
        FixedGridProcessor(processors["pil"], (1, 7, 8))
    with pytest.raises(GridError, match="is a video's"):
        FixedGridProcessor(processors["pil"], (2, 8, 8))
    with pytest.raises(ConfigurationError, match="1x2x2 needs images of 784 pixels"):
        FixedGridProcessor(processors["pil"], (1, 2, 2))


@pytest.mark.parametrize("change", [{"resample": 2}, {"do_resize": False}])
def test_a_processor_that_resizes_otherwise_is_refused(change):
    process = ImageProcessor(hugging_face("pil", **change))
    with pytest.raises(ConfigurationError, match="does not resize with the bicubic filter"):
        FixedGridProcessor(process, (1, 8, 12))


def test_an_unknown_policy_is_refused(processors):
    with pytest.raises(ConfigurationError, match="no policy 'strech'"):
        FixedGridProcessor(processors["pil"], (1, 8, 12), "strech")


def test_a_processor_that_does_more_than_a_table_is_refused(processors):
    right = processors["pil"]

    def table_of(change):
        return read_levels(lambda pixels: change(right(Image.fromarray(pixels), resize=False)[0]), 14, 2)

    assert np.array_equal(table_of(lambda patches: patches).values, levels_of(right).values)
    for wrong in (
        lambda patches: patches[::-1],
        lambda patches: patches[:, ::-1],
        lambda patches: patches[:-1],
        lambda patches: patches[:, :-1],
        lambda patches: patches.astype(np.float64),
        lambda patches: patches - patches.mean(axis=1, keepdims=True),
        lambda patches: patches - patches.mean(),
        lambda patches: (patches - patches.min()) / (patches.max() - patches.min()),
        lambda patches: patches * np.nan,
        lambda patches: patches.ravel(),
    ):
        with pytest.raises(ConfigurationError, match="does more to pixels"):
            table_of(wrong)


@pytest.mark.parametrize("processor", BACKENDS)
@pytest.mark.parametrize("policy", ["letterbox", "stretch"])
def test_fitted_images_become_what_the_processor_makes_of_them(tower, processors, processor, policy):
    process = processors[processor]
    coverages = tuple(FixedGrid(grid) for grid in (Grid(1, 8, 16), Grid(1, 16, 8)))
    fitter = Fitter(tower, coverages, policy, process.min_pixels, process.max_pixels)
    for image in (picture(90, 200), picture(200, 90), picture(112, 224), picture(110, 231), picture(40, 41)):
        theirs, grid = process(fitter.fit(image))
        assert grid == fitter.grid_for(image.height, image.width)
        assert np.array_equal(FixedGridProcessor(process, grid, policy)([image]), theirs)


def test_programs_for_every_grid_leave_the_size_to_the_processor(tower, processors):
    process = processors["pil"]
    fitter = Fitter(tower, (AnyGrid(), FixedGrid(Grid(1, 8, 16))), "letterbox", process.min_pixels, process.max_pixels)
    for image in (picture(90, 200), picture(110, 231)):
        patches, grid = process(fitter.fit(image))
        theirs, expected = process(image)
        assert grid == expected
        assert np.array_equal(patches, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_its_folder_and_its_tower_give_the_same(digits, tower, backend):
    image = picture(120, 210)
    answers = [
        fixed_grid_processor(source, (1, 8, 16), policy="stretch", backend=backend)([image])
        for source in (digits, str(digits), tower)
    ]
    assert answers[0].shape == (128, tower.patch_width)
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


def test_a_backend_that_transformers_lacks_is_refused(digits, monkeypatch):
    import transformers

    other = SimpleNamespace(from_pretrained=lambda folder, backend: hugging_face("pil"))
    monkeypatch.setattr(transformers, "AutoImageProcessor", other)
    with pytest.raises(ConfigurationError, match="no image processor on torchvision"):
        fixed_grid_processor(digits, (1, 8, 16), backend="torchvision")
