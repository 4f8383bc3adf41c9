"""A bundle is bound to what patches depend on, however the image processor was saved."""

import json

import pytest
from transformers import AutoImageProcessor

from bundle_tools import DYNAMIC, forge
from visionaccel.bundle import export_bundle, open_bundle, processor_digest, require_processor
from visionaccel.bundle.processor import _file_digest
from visionaccel.encoder import open_tower
from visionaccel.errors import CheckpointError, ConfigurationError

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RELEASED = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": MEAN, "image_std": STD, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "X",
}  # fmt: skip
"""As the released models have it: what is not in it, the class has."""

SAVED_AGAIN = [
    {**RELEASED, "image_processor_type": "Qwen2VLImageProcessorFast", "do_rescale": True, "rescale_factor": 1 / 255},
    {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "patch_size": 14, "do_normalize": True, "resample": 3},
    {
        "image_mean": tuple(MEAN),
        "image_std": STD,
        "resample": "bicubic",
        "device": None,
        "data_format": "channels_first",
    },
    {"max_pixels": 1003520, "do_convert_rgb": None, "disable_grouping": False, "return_tensors": "pt"},
    {},
]
OTHERS = [
    {"patch_size": 16}, {"temporal_patch_size": 1}, {"merge_size": 1}, {"resample": 2}, {"resample": "bilinear"},
    {"rescale_factor": 1 / 127.5}, {"image_mean": [0.5, 0.5, 0.5]}, {"image_std": 0.5}, {"do_normalize": False},
    {"do_rescale": False}, {"do_resize": False}, {"do_convert_rgb": False},
]  # fmt: skip


def saved(folder, config, *, whole=False):
    """A folder with an image processor's configuration, in the whole processor's file or alone."""
    folder.mkdir()
    name = "processor_config.json" if whole else "preprocessor_config.json"
    (folder / name).write_text(json.dumps({"image_processor": config} if whole else config))
    return folder


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("config", SAVED_AGAIN)
def test_the_same_processor_saved_in_another_way_has_the_same_digest(tmp_path, config, whole):
    stated = processor_digest(saved(tmp_path / "released", RELEASED))
    again = saved(tmp_path / "again", config, whole=whole)
    assert processor_digest(again) == stated
    require_processor(stated, again, tmp_path)


@pytest.mark.parametrize("change", OTHERS)
def test_whatever_patches_depend_on_is_in_the_digest(tmp_path, change):
    stated = processor_digest(saved(tmp_path / "released", RELEASED))
    other = saved(tmp_path / "other", {**RELEASED, **change})
    with pytest.raises(ConfigurationError, match="a different image processor"):
        require_processor(stated, other, tmp_path)


def test_what_is_switched_off_has_no_say(tmp_path):
    plain = saved(tmp_path / "plain", {**RELEASED, "do_normalize": False})
    other = saved(tmp_path / "other", {**RELEASED, "do_normalize": False, "image_mean": [0.0, 0.0, 0.0]})
    assert processor_digest(plain) == processor_digest(other)


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_what_this_release_of_transformers_saves_is_accepted(tmp_path, backend):
    released = saved(tmp_path / "released", RELEASED)
    AutoImageProcessor.from_pretrained(released, backend=backend).save_pretrained(tmp_path / "again")
    assert processor_digest(tmp_path / "again") == processor_digest(released)


@pytest.mark.parametrize(
    "change",
    [{"patch_size": "wide"}, {"patch_size": 14.5}, {"patch_size": True}, {"do_resize": "yes"}, {"rescale_factor": "x"},
     {"image_mean": [None]}, {"resample": "cubic"}, {"resample": [3]}],
)  # fmt: skip
def test_a_setting_that_is_not_of_its_kind_is_refused_by_name(tmp_path, change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        processor_digest(saved(tmp_path / "damaged", {**RELEASED, **change}))


@pytest.fixture
def earlier(digits, tmp_path):
    """A bundle that holds its weights, as an earlier release wrote it."""
    folder = export_bundle(open_tower(digits), tmp_path / "earlier", [DYNAMIC], self_contained=True).folder
    forge(folder, lambda stated: stated.update(processor_digest=_file_digest(folder)))
    return folder


def test_a_bundle_of_an_earlier_release_is_accepted_where_its_own_file_says_the_same(earlier, digits, tmp_path):
    stated = open_bundle(earlier).manifest.processor_digest
    assert stated != processor_digest(earlier)
    require_processor(stated, digits, earlier)
    again = saved(tmp_path / "again", RELEASED)
    assert _file_digest(again) != stated
    require_processor(stated, again, earlier)
    other = saved(tmp_path / "other", {**RELEASED, "image_mean": [0.0, 0.0, 0.0]})
    with pytest.raises(ConfigurationError, match="a different image processor"):
        require_processor(stated, other, earlier)


def test_one_that_does_not_hold_the_file_is_accepted_with_the_very_file(earlier, digits, tmp_path):
    stated = open_bundle(earlier).manifest.processor_digest
    empty = tmp_path / "empty"
    empty.mkdir()
    require_processor(stated, digits, empty)
    with pytest.raises(ConfigurationError, match="saved again"):
        require_processor(stated, saved(tmp_path / "again", RELEASED), empty)
