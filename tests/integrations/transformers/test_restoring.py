"""The handle restores the model; a model with an encoder is copied, saved and given weights without surprises."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForImageTextToText

from questions import answered
from visionaccel.bundle import strip_checkpoint
from visionaccel.checkpoint import Checkpoint
from visionaccel.errors import CheckpointError, ConfigurationError
from visionaccel.integrations.transformers import accelerate, load


def test_the_very_same_tower_is_back_after_the_context(model, inputs):
    own, theirs = model.model.visual, answered(model, inputs)
    with accelerate(model, backend="onnxrt") as handle:
        assert handle.model is model
        assert model.model.visual is not own
        assert answered(model, inputs).tokens.equal(theirs.tokens)
    assert model.model.visual is own
    assert handle.encoder.closed
    assert all(torch.equal(a, b) for a, b in zip(answered(model, inputs), theirs, strict=True))


def test_the_tower_is_back_after_an_error_too_and_restoring_twice_does_nothing(model):
    own = model.model.visual
    with pytest.raises(ZeroDivisionError), accelerate(model, backend="onnxrt") as handle:
        _ = 1 / 0
    assert model.model.visual is own
    handle.restore()
    assert model.model.visual is own


def test_the_own_tower_stays_if_the_encoder_goes_while_it_is_shown(model):
    own = model.model.visual
    handle = accelerate(model, backend="onnxrt")
    with handle.own_tower():
        handle.restore()
    assert model.model.visual is own
    handle = accelerate(model, backend="onnxrt")
    with handle.own_tower():
        second = accelerate(model, backend="onnxrt")
    assert model.model.visual.encoder is second.encoder
    handle.restore()
    assert model.model.visual.encoder is second.encoder
    second.restore()
    assert model.model.visual is own


def test_a_second_encoder_is_refused_until_the_first_is_gone(model):
    with accelerate(model, backend="onnxrt"), pytest.raises(ConfigurationError, match="has an encoder already"):
        accelerate(model, backend="onnxrt")
    accelerate(model, backend="torch_ref").restore()


def test_a_module_that_the_user_put_there_stays(model):
    handle = accelerate(model, backend="onnxrt")
    model.model.visual = theirs = torch.nn.Identity()
    handle.restore()
    assert model.model.visual is theirs
    assert handle.encoder.closed


@pytest.mark.parametrize("opened", [accelerate, load])
def test_a_closed_encoder_says_so(model, checkpoint, inputs, opened):
    handle = opened(model if opened is accelerate else checkpoint, backend="onnxrt")
    if opened is load:
        handle.restore()
    handle.encoder.close()
    with pytest.raises(ConfigurationError, match="the vision encoder of this model is closed"):
        answered(handle.model, inputs)


def test_a_closed_handle_cannot_be_entered(model):
    with accelerate(model, backend="onnxrt") as handle:
        pass
    with pytest.raises(ConfigurationError, match="is closed"), handle:
        pass


def test_the_encoder_is_closed_if_it_cannot_take_the_towers_place(checkpoint, model, monkeypatch):
    """transformers' `set_encoder` does nothing for a model that it does not know, without an error."""
    from visionaccel.trust import GuardedEncoder

    closed = []
    monkeypatch.setattr(GuardedEncoder, "close", lambda self, wait=None: closed.append(self))
    model.__class__ = type("Unknown", (type(model),), {"set_encoder": lambda self, *_, **__: None})
    with pytest.raises(ConfigurationError, match="did not replace the vision tower of a Unknown"):
        accelerate(model, backend="onnxrt")
    assert len(closed) == 1


def test_no_parameter_is_the_towers(model):
    with accelerate(model, backend="onnxrt"):
        assert not [name for name, _ in model.named_parameters() if "visual" in name]
        assert list(model.model.visual.buffers()) == []


def test_the_same_weights_can_be_loaded_and_others_are_refused(model):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = "model.visual.merger.linear_fc1.weight"
    with accelerate(model, backend="onnxrt"):
        assert model.state_dict().keys() == weights.keys()
        model.load_state_dict(weights)
        weights[changed][0, 0] += 1
        with pytest.raises(ConfigurationError, match=f"'{changed}' differs from the weights of the encoder"):
            model.load_state_dict(weights)
    model.load_state_dict(weights)


def test_a_copy_shares_the_encoder(model, inputs):
    with accelerate(model, backend="onnxrt"):
        other = copy.deepcopy(model)
        assert other.model.visual is model.model.visual
        assert other.model.language_model is not model.model.language_model
        assert answered(other, inputs).tokens.equal(answered(model, inputs).tokens)


def test_it_cannot_be_pickled(model):
    with accelerate(model, backend="onnxrt"), pytest.raises(TypeError, match="use save_pretrained"):
        pickle.dumps(model)


def test_a_model_of_a_stripped_checkpoint_is_not_saved_without_its_tower(checkpoint, inputs, tmp_path):
    strip_checkpoint(Checkpoint(checkpoint), tmp_path / "stripped")
    theirs = answered(AutoModelForImageTextToText.from_pretrained(checkpoint), inputs)
    with load(tmp_path / "stripped", bundle=checkpoint, backend="onnxrt") as handle:
        assert answered(handle.model, inputs).tokens.equal(theirs.tokens)
        with pytest.raises(CheckpointError, match="has no vision weights"):
            handle.model.save_pretrained(tmp_path / "saved")
