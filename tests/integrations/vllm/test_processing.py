"""vLLM's own processing information and data parser, with images made to fit a bundle's programs."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from served import served_model
from visionaccel.bundle import STRIP_NOTE, ProgramRequest, export_bundle, open_bundle, strip_checkpoint
from visionaccel.checkpoint import Checkpoint
from visionaccel.core.grid import Grid
from visionaccel.core.program import AnyGrid, FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import BundleError, ConfigurationError, InputError, UnfitGridError
from visionaccel.families import tower_of
from visionaccel.integrations.vllm.encoder_source import open_served_source
from visionaccel.settings import load_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    from vllm.config import ModelConfig
    from vllm.model_executor.layers.fusion.mm_input_norm import _load_norm_params
    from vllm.model_executor.models.qwen2_5_vl import (
        Qwen2_5_VLDummyInputsBuilder,
        Qwen2_5_VLMultiModalProcessor,
        Qwen2_5_VLProcessingInfo,
    )
    from vllm.multimodal.media import MediaWithBytes
    from vllm.multimodal.processing import InputProcessingContext, ProcessorInputs, TimingContext
    from vllm.tokenizers import cached_tokenizer_from_config

    from visionaccel.integrations.vllm import model
    from visionaccel.integrations.vllm.compat import architectures

architectures.register_models()
NAME = architectures.derived_name("Qwen2_5_VLForConditionalGeneration")
DerivedInfo, DerivedProcessor = getattr(model, f"{NAME}Info"), getattr(model, f"{NAME}Processor")
pytestmark = pytest.mark.filterwarnings("default")
GRIDS = ("8x16", "16x8", "12x12")


@pytest.fixture(scope="module")
def bundles(digits, tmp_path_factory):
    folder, tower = tmp_path_factory.mktemp("bundles"), open_tower(digits)
    fixed = [ProgramRequest(FixedGrid(Grid.parse(text))) for text in GRIDS]
    export_bundle(tower, folder / "fixed", fixed)
    export_bundle(tower, folder / "tiny", [ProgramRequest(FixedGrid(Grid(1, 2, 2)))])
    export_bundle(tower, folder / "bucket", [ProgramRequest(tower.bucket(Grid(1, 16, 16)))])
    export_bundle(tower, folder / "both", [*fixed, ProgramRequest(AnyGrid())])
    return folder


@pytest.fixture
def made(digits, bundles, monkeypatch):
    """Makes the processing information of a served digits model for a bundle and settings."""

    def make(bundle, mm_processor_kwargs=None, *, switched_off=False, **settings):
        named = {"backend": "onnxrt", "bundle": str(bundles / bundle), **settings}
        for name, value in named.items():
            monkeypatch.setenv(f"VISIONACCEL_{name.upper()}", value)
        config = ModelConfig(model=str(digits), dtype="float32", mm_processor_kwargs=mm_processor_kwargs)
        # As in a model of this package: vLLM sets False, and None is what we note of --no-mm-device-do-normalize, after
        # vLLM has made processing information for its own use.
        config.multimodal_config.mm_device_do_normalize = False
        DerivedInfo(InputProcessingContext(config, None))
        config.multimodal_config.mm_device_do_normalize = None if switched_off else False
        return DerivedInfo(InputProcessingContext(config, cached_tokenizer_from_config(config)))

    return make


def parsed(info, *images):
    (items,) = info.data_parser.parse_mm_data({"image": list(images)}).values()
    return list(items.data)


def test_images_of_every_kind_get_a_programs_grid(made):
    info = made("fixed")
    wide = np.zeros((50, 100, 3), np.uint8)
    wide[:, 60:] = 200
    kinds = [
        Image.fromarray(wide),
        Image.fromarray(wide).convert("L"),
        MediaWithBytes(Image.fromarray(wide), b"its bytes"),
        wide,
        wide.transpose(2, 0, 1),
        torch.from_numpy(wide),
        torch.from_numpy(wide).float(),
        wide[..., :1],
    ]
    first, *others = parsed(info, *kinds)
    assert first.size == (16 * 14, 8 * 14)
    for other in others:
        assert np.abs(np.asarray(other, int) - np.asarray(first, int)).max() <= 2
    assert [image.size for image in parsed(info, first, others[0])] == [first.size] * 2, "parsing again changes nothing"


def test_images_known_by_their_identifier_stay_unknown(made):
    assert parsed(made("fixed"), None, np.zeros((30, 30, 3), np.uint8))[0] is None


def test_what_is_no_image_is_an_input_error(made):
    with pytest.raises(InputError, match="cannot be read"):
        parsed(made("fixed"), np.zeros((3, 4, 5, 6, 7)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_image_with_a_value_that_is_not_finite_is_an_input_error(made, bad):
    info = made("fixed")
    grey = np.full((30, 40, 3), 128, np.float32)
    grey[3, 4, 0] = bad
    kinds = [
        grey,
        grey.transpose(2, 0, 1),
        grey.astype(np.float64),
        grey.astype(np.float16),
        torch.from_numpy(grey),
        torch.from_numpy(grey).bfloat16(),
    ]
    for image in kinds:
        with pytest.raises(InputError, match="1 values that are NaN or infinite"):
            parsed(info, image)


def pixels(processor, options):
    """Pixel values that a processor makes of an image."""
    image = np.random.default_rng(3).integers(0, 256, (56, 84, 3), np.uint8)
    token = processor.info.get_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    items = processor.info.parse_mm_data({"image": [image]})
    inputs = ProcessorInputs([token], items, hf_processor_mm_kwargs=options)
    (item,) = processor.apply(inputs, TimingContext())["mm_kwargs"]["image"]
    return item["pixel_values"].data


def stock_pixels(folder, of_server):
    """What vLLM's own tower gets of that image: raw pixels of its processor, normalised by its parameters."""
    config = ModelConfig(model=str(folder), dtype="float32", mm_processor_kwargs=of_server)
    config.multimodal_config.mm_device_do_normalize = True
    info = Qwen2_5_VLProcessingInfo(InputProcessingContext(config, cached_tokenizer_from_config(config)))
    raw = pixels(Qwen2_5_VLMultiModalProcessor(info, Qwen2_5_VLDummyInputsBuilder(info)), {})
    by, channels = _load_norm_params(config), raw.float().reshape(len(raw), 3, -1)
    mean, std = (torch.tensor(each)[:, None] for each in (by.image_mean, by.image_std))
    return ((channels * by.rescale_factor - mean) / std).reshape(raw.shape)


@pytest.fixture
def processed(made):
    """Makes what vLLM's processor makes of an image, with options of a request and of the server."""

    def process(options, of_server=None, *, switched_off=False):
        info = made("both", of_server, switched_off=switched_off)
        return pixels(DerivedProcessor(info, Qwen2_5_VLDummyInputsBuilder(info)), options)

    return process


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 16},
        {"merge_size": 4},
        {"temporal_patch_size": 1},
        {"patch_size": 7, "temporal_patch_size": 8},  # rows of the same width
        {"images_kwargs": {"patch_size": 16}},
        {"videos_kwargs": {"merge_size": None}},
    ],
)
def test_options_of_a_request_that_cut_images_in_another_way_are_an_input_error(processed, options):
    with pytest.raises(InputError, match=r"mm_processor_kwargs sets (patch_size|merge_size|temporal_patch_size)="):
        processed(options)


def test_options_of_a_request_count_as_they_do_with_vllms_own_encoder(processed):
    usual = processed({})
    assert torch.equal(processed({"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}), usual)
    for ignored in ({"do_normalize": False}, {"do_rescale": False}, {"images_kwargs": {"image_mean": [0.0, 0.0, 0.0]}}):
        assert torch.equal(processed(ignored), usual), "vLLM normalises on its device, whatever a request says"
        assert not torch.equal(processed(ignored, switched_off=True), usual)
    assert len(processed({"max_pixels": 3136})) < len(usual)


def test_a_model_that_vllm_cannot_normalise_on_its_device_obeys_all_options(processed, monkeypatch):
    usual = processed({})
    stock = architectures.stock_class("Qwen2_5_VLForConditionalGeneration")
    monkeypatch.setattr(stock, "supports_mm_device_do_normalize", False)
    for options in ({"do_normalize": False}, {"do_rescale": False}):
        assert not torch.equal(processed(options), usual)
        assert not torch.equal(processed({}, options), usual)


@pytest.mark.parametrize(
    "options",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"image_mean": [0.0, 0.0, 0.0]},
        {"image_std": [1.0, 1.0, 1.0]},
        {"rescale_factor": 0.5},
        {"images_kwargs": {"do_rescale": False}, "max_pixels": 12544},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_server_count_as_they_do_with_vllms_own_encoder(processed, digits, caplog, options):
    ours = processed({}, options)
    assert "--mm-processor-kwargs sets how pixels are normalised" in caplog.text
    stock = {name: value for name, value in options.items() if name != "images_kwargs"}
    torch.testing.assert_close(ours, stock_pixels(digits, stock), rtol=0, atol=1e-5)
    assert torch.equal(ours, processed({}))
    assert not torch.equal(processed({}, options, switched_off=True), ours)


def test_the_largest_image_is_the_largest_program(made):
    info = made("fixed")
    assert tuple(info.get_image_size_with_most_features()) == (12 * 14, 12 * 14)
    assert info.get_max_image_tokens() == 36
    assert made("bucket").get_max_image_tokens() == 64


def test_token_counts_are_those_of_the_fitted_image(made):
    info = made("fixed")
    for size, tokens in (((50, 100), 32), ((100, 50), 32), ((300, 310), 36)):
        height, width = size
        counted = info.get_num_image_tokens(
            image_width=width, image_height=height, image_processor=info.get_image_processor(), mm_kwargs={}
        )
        assert counted == tokens


def test_embeddings_in_the_place_of_images_need_no_program(made):
    info = made("fixed")
    items = {"image": [{"image_embeds": None, "image_grid_thw": None}]}
    processor = object.__new__(DerivedProcessor)
    processor.info = info
    pixels = {"pixel_values": None, "image_grid_thw": SimpleNamespace(data=torch.tensor([1, 20, 20]))}
    with pytest.raises(UnfitGridError):  # the same way refuses pixels
        processor._get_prompt_updates(None, {}, {"image": [pixels]})
    assert len(processor._get_prompt_updates(None, {}, items)) == 2


def test_without_a_fallback_videos_are_refused(made):
    info = made("fixed")
    assert info.supported_mm_limits == {"image": None, "video": 0}
    clip = (np.zeros((2, 28, 28, 3), np.uint8), {"fps": 1.0})
    with pytest.raises(UnfitGridError, match="does not accept videos"):
        info.validate_num_items("video", 1)
    info.validate_num_items("image", 1)
    with pytest.raises(UnfitGridError, match="does not accept videos") as caught:
        info.parse_mm_data({"video": [clip]})
    assert "VISIONACCEL_FALLBACK" in str(caught.value)
    assert len(made("fixed", fallback="torch_ref").parse_mm_data({"video": [clip]})["video"]) == 1
    assert len(info.parse_mm_data({"video": []}).get("video", [])) == 0


def test_a_grid_that_options_of_a_request_forced_is_refused(made):
    info = made("fixed")
    info.check_fits("image", torch.tensor([1, 8, 16]))
    with pytest.raises(UnfitGridError, match=r"this image has grid 1x20x20, but the encoder's programs accept 8x16"):
        info.check_fits("image", torch.tensor([1, 20, 20]))
    made("fixed", fallback="torch_ref").check_fits("image", torch.tensor([1, 20, 20]))


@pytest.mark.parametrize("kind", ["grid", "aspect ratio", "video", "not an image"])
def test_what_is_refused_is_a_validation_error_of_vllm_with_our_text(made, kind):
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import VLLMValidationError

    info = made("fixed")
    refuse = {
        "grid": lambda: info.check_fits("image", torch.tensor([1, 20, 20])),
        "aspect ratio": lambda: info.data_parser.parse_mm_data({"image": [Image.new("RGB", (402, 2))]}),
        "video": lambda: info.validate_num_items("video", 1),
        "not an image": lambda: info.data_parser.parse_mm_data({"image": [np.zeros((3, 5, 5, 5))]}),
    }[kind]
    with pytest.raises(InputError) as caught:
        refuse()
    assert isinstance(caught.value, VLLMValidationError)
    error = create_error_response(caught.value).error
    assert (error.code, error.type) == (400, "BadRequestError")
    assert error.message == str(caught.value)
    assert caught.value.hint in error.message


def test_a_grid_that_the_processor_would_resize_is_refused_at_start(made):
    with pytest.raises(
        ConfigurationError, match=r"2x2 needs images of 784 pixels, but the processor makes images of 3136"
    ):
        _ = made("tiny").fitter
    assert made("tiny", {"min_pixels": 784}).fitter.largest == Grid(1, 2, 2)
    with pytest.raises(ConfigurationError, match=r"up to 256 patches in 4 windows needs images of 50176 pixels"):
        _ = made("bucket", {"min_pixels": 200704}).fitter
    assert made("tiny", {"images_kwargs": {"size": {"shortest_edge": 784}}}).fitter.largest == Grid(1, 2, 2)


@pytest.mark.parametrize("settings", [{"fit": "none"}, {"bundle_name": "both"}])
def test_images_stay_as_they_are_where_nothing_is_to_be_fitted(made, settings):
    info = made(settings.pop("bundle_name", "fixed"), **settings)
    assert parsed(info, Image.new("RGB", (90, 70)))[0].size == (90, 70)


def test_a_broken_backend_does_not_hide_a_fallback(made):
    info = made("fixed", device="npu", fallback="torch_ref")
    assert info.grids is None
    assert info.supported_mm_limits == {"image": None, "video": None}


@pytest.fixture
def other(digits, tmp_path):
    """The digits checkpoint with one bit of its vision weights flipped."""
    folder = tmp_path / "other"
    folder.mkdir()
    for file in digits.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    stored = tower_of(Checkpoint(folder)).weights["blocks.0.mlp.gate_proj.weight"]
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        byte = file.read(1)
        file.seek(stored.offset)
        file.write(bytes([byte[0] ^ 1]))
    return folder


def test_a_bundle_of_other_vision_weights_is_refused(digits, other, bundles, tmp_path, monkeypatch):
    bundle = export_bundle(open_tower(digits), tmp_path / "packed", [ProgramRequest(AnyGrid())], self_contained=True)
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(bundle.folder))
    assert open_served_source(served_model(digits), load_settings()).manifest == bundle.manifest
    with pytest.raises(ConfigurationError, match="made from different vision weights"):
        open_served_source(served_model(other), load_settings())
    strip_checkpoint(Checkpoint(other), tmp_path / "stripped")
    for encoder in (bundle.folder, digits):  # a plain checkpoint as the encoder must be the right one too
        monkeypatch.setenv("VISIONACCEL_BUNDLE", str(encoder))
        for name in ("stripped", "other"):
            with pytest.raises(ConfigurationError, match="made from different vision weights"):
                open_served_source(served_model(tmp_path / name), load_settings())
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(other))
    assert open_served_source(served_model(tmp_path / "stripped"), load_settings()).checkpoint.folder == other
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(bundle.folder))
    with pytest.raises(ConfigurationError, match="made from different vision weights"):
        open_served_source(served_model(tmp_path / "stripped"), load_settings())


def test_an_encoder_of_other_sizes_is_refused_even_where_no_digest_is_known(digits, tiny, tmp_path, monkeypatch):
    strip_checkpoint(Checkpoint(digits), tmp_path / "stripped")
    (tmp_path / "stripped" / STRIP_NOTE).unlink()
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(tiny))
    with pytest.raises(ConfigurationError, match="made for a different vision configuration"):
        open_served_source(served_model(tmp_path / "stripped"), load_settings())


def test_the_configuration_that_is_served_decides(digits, bundles, monkeypatch):
    changed = {**Checkpoint(digits).config["vision_config"], "fullatt_block_indexes": [1]}
    assert open_served_source(served_model(digits, changed), load_settings()).spec.full_blocks == (1,)
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(bundles / "fixed"))
    with pytest.raises(ConfigurationError, match=r"made for a different vision configuration.*full_blocks"):
        open_served_source(served_model(digits, changed), load_settings())
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(digits))
    with pytest.raises(ConfigurationError, match="made for a different vision configuration"):
        open_served_source(served_model(digits, changed), load_settings())


def test_a_bundle_for_another_image_processor_is_refused(digits, other, bundles, monkeypatch):
    config = other / "processor_config.json"
    config.write_text(config.read_text().replace("0.48145466", "0.5"))
    (other / "model.safetensors").write_bytes((digits / "model.safetensors").read_bytes())
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(bundles / "fixed"))
    with pytest.raises(ConfigurationError, match="a different image processor"):
        open_served_source(served_model(other), load_settings())


def test_the_served_checkpoint_stands_in_for_one_that_moved(digits, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in digits.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    bundle = export_bundle(open_tower(moved), tmp_path / "bundle", [ProgramRequest(AnyGrid())])
    moved.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(bundle.folder))
    source = open_served_source(served_model(digits), load_settings())
    assert source.tower.checkpoint.folder == digits
    with pytest.raises(BundleError, match="needs the vision weights"):
        open_bundle(bundle.folder)
