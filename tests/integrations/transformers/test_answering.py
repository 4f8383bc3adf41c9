"""Answers and their probabilities, the model's own tower next to an encoder, and the float32 reference of a task."""

import json
import shutil

import pytest
import torch
import transformers

from bundles import write_bundle
from visionaccel.errors import ConfigurationError
from visionaccel.integrations.transformers import accelerate, load
from visionaccel.integrations.transformers.answering import ask, open_processor
from visionaccel.integrations.transformers.evaluation import evaluate, read_task
from visionaccel.integrations.transformers.tower import EncoderTower, tower_place

QUESTION = "Read the digits."


@pytest.fixture(scope="module")
def sample():
    from digits_vlm.samples import held_out_images

    (found,) = held_out_images(1)
    return found


@pytest.fixture(scope="module")
def processor(digits):
    return open_processor(digits)


@pytest.fixture(scope="module")
def handle(digits):
    """The digits reader with an encoder on ONNX Runtime, and with its own tower."""
    with load(digits, backend="onnxrt", keep_tower=True) as found:
        yield found


@torch.no_grad()
def test_log_probabilities_are_those_of_the_whole_answer_at_once(handle, processor, sample):
    answer = ask(handle.model, processor, [sample.image], QUESTION, scored=True)
    assert answer.text == sample.truth
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    whole = prompt + processor.tokenizer.decode(answer.tokens)
    inputs = processor(text=[whole], images=[sample.image], return_tensors="pt")
    count = len(answer.tokens)
    assert inputs["input_ids"][0, -count:].tolist() == list(answer.tokens)
    logits = handle.model(**inputs).logits[0, -count - 1 : -1].double().log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(logits, answer.tokens, strict=True)]
    assert answer.log_probabilities == pytest.approx(expected, abs=1e-5)


def test_a_given_answer_is_scored_as_if_it_were_the_models(handle, processor, sample):
    own = ask(handle.model, processor, [sample.image], QUESTION, scored=True)
    assert ask(handle.model, processor, [sample.image], QUESTION, scored=True, given=own.tokens).tokens == own.tokens
    other = (*own.tokens[:1], own.tokens[0], *own.tokens[2:])
    forced = ask(handle.model, processor, [sample.image], QUESTION, scored=True, given=other)
    assert forced.tokens == other
    assert forced.log_probabilities[0] == pytest.approx(own.log_probabilities[0], abs=1e-6)
    assert forced.log_probabilities[1] < own.log_probabilities[1]


def test_the_own_tower_is_in_its_place_only_in_the_context(handle, processor, sample, told):
    with handle.own_tower() as tower:
        assert tower_place(handle.model)[1] is tower
        own = ask(handle.model, processor, [sample.image], QUESTION)
        assert not told.encoded
    assert isinstance(tower_place(handle.model)[1], EncoderTower)
    assert ask(handle.model, processor, [sample.image], QUESTION).tokens == own.tokens
    assert len(told.encoded) == 1


def test_a_model_without_its_tower_has_none_to_show(digits):
    with (
        load(digits, backend="onnxrt") as found,
        pytest.raises(ConfigurationError, match=r"without its vision tower\. Load it with `keep_tower=True`"),
        found.own_tower(),
    ):
        pass


@pytest.mark.parametrize(("policy", "size"), [("letterbox", (168, 112)), ("none", None)])
def test_images_are_fitted_as_the_settings_say(digits, processor, sample, tmp_path, policy, size):
    bundle = write_bundle(digits, tmp_path / "bundle", "8x12")
    model = transformers.AutoModelForImageTextToText.from_pretrained(digits)
    with accelerate(model, bundle=bundle, settings={"backend": "onnxrt", "fit": policy}) as found:
        assert found.encoder.primary.backend == "onnxrt"
        fitter = found.fitter(processor)
        assert (fitter and fitter.fit(sample.image).size) == size


def test_the_reference_of_a_task_is_in_float32_and_the_language_model_is_not(digits, sample, tmp_path):
    checkpoint = shutil.copytree(digits, tmp_path / "bfloat16")
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(checkpoint)
    sample.image.save(tmp_path / "digits.png")
    line = {"image": "digits.png", "question": QUESTION, "answer": sample.truth}
    (tmp_path / "task.jsonl").write_text(json.dumps(line))
    found = evaluate(checkpoint, read_task(tmp_path / "task.jsonl"), backend="torch_ref")
    (outcome,) = found.outcomes
    processor = open_processor(checkpoint)
    rounded = ask(model, processor, [sample.image], QUESTION, scored=True)
    model.model.visual.float()
    assert model.lm_head.weight.dtype == torch.bfloat16
    expected = ask(model, processor, [sample.image], QUESTION, scored=True)
    assert outcome.reference.log_probabilities == expected.log_probabilities != rounded.log_probabilities
    assert found.agreement == found.accuracy == 1
