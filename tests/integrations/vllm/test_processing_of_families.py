"""Every kind of vLLM's processors, with images made to fit a bundle's programs."""

import inspect
import warnings

import numpy as np
import pytest

from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from whole_models import MODELS, write_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    from vllm.config import ModelConfig
    from vllm.model_executor.models import registry
    from vllm.multimodal.processing import InputProcessingContext, ProcessorInputs, TimingContext
    from vllm.tokenizers import cached_tokenizer_from_config

    from visionaccel.integrations.vllm import model
    from visionaccel.integrations.vllm.compat import architectures

architectures.register_models()
pytestmark = pytest.mark.filterwarnings("ignore")

ASKED = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5OmniModel",
    "Qwen3VLForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "DotsOCRForCausalLM",
)


@pytest.fixture(scope="module", params=ASKED)
def served(request, tmp_path_factory):
    """A model and its checkpoint."""
    return MODELS[request.param], write_model(MODELS[request.param], tmp_path_factory.mktemp("model"))


@pytest.fixture
def made(served, tmp_path, monkeypatch):
    """Makes the processor of a served model for a bundle of one grid."""

    def make(grid, options=None):
        described, checkpoint = served
        if not (tmp_path / grid).exists():
            export_bundle(open_tower(checkpoint), tmp_path / grid, [ProgramRequest(FixedGrid(Grid.parse(grid)))])
        monkeypatch.setenv("VISIONACCEL_BACKEND", "onnxrt")
        monkeypatch.setenv("VISIONACCEL_BUNDLE", str(tmp_path / grid))
        monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())
        config = ModelConfig(
            model=str(checkpoint), dtype="float32", trust_remote_code=True, mm_processor_kwargs=options
        )
        kind = getattr(model, architectures.derived_name(described.architecture))
        info, processor, dummy_inputs = architectures.processing_of(kind)
        of_model = info(InputProcessingContext(config, cached_tokenizer_from_config(config)))
        return processor(of_model, dummy_inputs(of_model))

    return make


def processed(processor, token, options=None):
    image = np.random.default_rng(3).integers(0, 256, (50, 170, 3), np.uint8)
    number = processor.info.get_tokenizer().convert_tokens_to_ids(token)
    items = processor.info.parse_mm_data({"image": [image]})
    inputs = ProcessorInputs([number], items, hf_processor_mm_kwargs=options or {})
    result = processor.apply(inputs, TimingContext())
    (item,), (place,) = result["mm_kwargs"]["image"], result["mm_placeholders"]["image"]
    return item, place


def test_an_image_gets_the_programs_grid_and_as_many_tokens(served, made):
    described, _ = served
    processor = made("8x12")
    item, place = processed(processor, next(iter(described.ids.values())))
    assert item["image_grid_thw"].data.tolist() == [1, 8, 12]
    assert item["pixel_values"].data.shape == (96, processor.info.grids.tower.patch_width)
    assert place.get_num_embeds() == 24


def test_vllm_plans_an_image_with_the_programs_grid(served, made):
    info = made("8x12").info
    assert info.get_max_image_tokens() == 24
    assert tuple(info.get_image_size_with_most_features()) == (12 * served[0].patch, 8 * served[0].patch)
    wanted = {"image_processor": info.get_image_processor(), "mm_kwargs": {}}
    known = inspect.signature(info.get_num_image_tokens).parameters
    given = {name: value for name, value in wanted.items() if name in known}
    assert info.get_num_image_tokens(image_width=170, image_height=50, **given) == 24
    assert info.get_supported_mm_limits().get("video", 0) == 0


def test_a_grid_beyond_the_processors_largest_image_is_refused(made):
    made("20x20").info.get_max_image_tokens()
    with pytest.raises(ConfigurationError, match="needs images of"):
        made("26x26").info.get_max_image_tokens()


def test_normalisation_is_left_to_options_where_vllms_own_encoder_obeys_them(served, made):
    described, _ = served
    processor, token = made("8x12"), next(iter(described.ids.values()))
    usual, asked = (
        processed(processor, token, options)[0]["pixel_values"].data for options in ({}, {"do_normalize": False})
    )
    stock = architectures.stock_class(described.architecture)
    assert bool((usual == asked).all()) == getattr(stock, "supports_mm_device_do_normalize", False)
