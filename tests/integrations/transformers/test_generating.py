"""Everything that generates works with an encoder in the tower's place, which encodes each image once."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, pipeline

from questions import answered, picture
from visionaccel.integrations.transformers import accelerate, load

ASKED = {"max_new_tokens": 5, "min_new_tokens": 5}
GRIDS = [(1, 6, 8), (1, 10, 4)]


def requests(told):
    """The grids of each encode that was not a check."""
    return [[(grid.t, grid.h, grid.w) for grid in each.grids] for each in told.encoded if each.purpose == "request"]


@pytest.mark.parametrize(
    "how", [{"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=list
)
def test_an_image_is_encoded_once_whatever_the_beams_and_samples(model, inputs, told, how):
    def generate():
        torch.manual_seed(0)
        return model.generate(**inputs, **ASKED, **{"do_sample": False, **how})

    theirs = generate()
    with accelerate(model, backend="onnxrt"):
        assert generate().equal(theirs)
    assert requests(told) == [GRIDS]


def test_features_that_were_computed_before_are_used(model, inputs, told):
    theirs = answered(model, inputs)
    with accelerate(model, backend="onnxrt"):
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        found = answered(model, {**rest, "mm_encoder_outputs": {"image": features}})
    assert found.tokens.equal(theirs.tokens)
    assert requests(told) == [GRIDS]


def test_a_static_cache_changes_nothing(model, inputs):
    theirs = model.generate(**inputs, **ASKED, do_sample=False)
    with accelerate(model, backend="onnxrt"):
        assert model.generate(**inputs, **ASKED, do_sample=False, cache_implementation="static").equal(theirs)


def test_compiled_code_calls_the_encoder(model, inputs, told):
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    with accelerate(model, backend="onnxrt"):
        tower = model.model.visual
        compiled = torch.compile(lambda *given: 2 * tower(*given).pooler_output, backend="eager")
        assert compiled(pixels, grids).equal(2 * tower(pixels, grids).pooler_output)
    torch._dynamo.reset()
    assert requests(told) == [GRIDS, GRIDS]


def test_the_pipeline_answers_chats_of_one_and_several_images(model, processor, told):
    processor.tokenizer.padding_side = "left"

    def chat(*images):
        return [{"role": "user", "content": [*({"type": "image", "image": each} for each in images), _QUESTION]}]

    chats = [chat(picture(3, 3, 32, 1)), chat(picture(4, 3, 32, 2), picture(2, 5, 32, 3))]

    def answers():
        ask = pipeline("image-text-to-text", model=model, processor=processor)
        found = [ask(text=chats[1], generate_kwargs=ASKED), *ask(text=chats, generate_kwargs=ASKED, batch_size=2)]
        return [answer["generated_text"] for (answer,) in found]

    theirs = answers()
    told.encoded.clear()
    with accelerate(model, backend="onnxrt"):
        assert answers() == theirs
    assert sum(len(grids) for grids in requests(told)) == 5


_QUESTION = {"type": "text", "text": "Read the digits."}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_a_model_of_low_precision_are_computed_in_float32(checkpoint, model, inputs, dtype):
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    low = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype)

    def features(each):
        with torch.inference_mode():
            found = each.get_image_features(pixels, grids)
        return torch.cat([*found.pooler_output, *found.deepstack_features[0]]).float()

    own = features(low)
    model.model.visual.load_state_dict(low.model.visual.state_dict())  # the rounded weights, computed in float32
    exact = features(model)
    with accelerate(low, backend="onnxrt"):
        assert low.dtype == dtype
        ours = features(low)
        assert answered(low, inputs).tokens.shape == (1, 6)
    assert (ours - exact).abs().max() <= 1e-4
    assert (own - exact).abs().max() > 1e-3


def test_the_language_model_is_loaded_in_the_dtype_that_is_asked_for(checkpoint, inputs):
    with load(checkpoint, backend="onnxrt", dtype=torch.bfloat16) as handle:
        assert {parameter.dtype for parameter in handle.model.parameters()} == {torch.bfloat16}
        assert answered(handle.model, inputs).tokens.shape == (1, 6)
