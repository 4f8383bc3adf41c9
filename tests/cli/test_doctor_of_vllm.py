"""What `visionaccel doctor` tells of vLLM: each feature and each model once, whatever this vLLM lacks."""

import pytest

from visionaccel.cli.diagnosis.children import _activation, _contract
from visionaccel.errors import PluginError
from visionaccel.integrations.vllm.compat import architectures, contract
from visionaccel.integrations.vllm.compat.contract import Feature

MODELS = ("OneForConditionalGeneration", "OtherForConditionalGeneration")


@pytest.fixture
def lacking(monkeypatch):
    """Has vLLM lack names of a feature: some in general (None), others of a model."""

    def lack(feature, names):
        def missing(asked, architecture=None):
            return (*names[None], *(names[architecture] if architecture else ())) if asked is feature else ()

        monkeypatch.setattr(contract, "missing", missing)

    return lack


def test_a_feature_is_one_finding_with_all_that_it_lacks_of_vllm(lacking):
    lacking(Feature.PIPELINED, {None: ("a is gone", "b is gone"), MODELS[0]: (), MODELS[1]: ()})
    (found,) = _contract(MODELS)
    assert (found.name, found.status) == ("contract: pipelined", "warning")
    assert found.detail.startswith("a is gone; b is gone. Without it, ")


def test_what_replacing_any_encoder_needs_is_a_failure(lacking):
    lacking(Feature.INLINE, {None: ("a is gone",), MODELS[0]: (), MODELS[1]: ()})
    (found,) = _contract(MODELS)
    assert (found.name, found.status) == ("contract: in-line", "failure")


def test_what_one_model_lacks_is_a_warning_about_it_alone(lacking):
    lacking(Feature.INLINE, {None: (), MODELS[0]: ("b is gone",), MODELS[1]: ()})
    (found,) = _contract(MODELS)
    assert (found.name, found.status) == (f"contract: {MODELS[0]}", "warning")
    assert found.detail == "b is gone. Without it, with this model vLLM does not start with VISIONACCEL_BACKEND set"


def test_a_broken_row_of_another_distribution_is_a_warning_about_its_model_alone(monkeypatch):
    def missing(feature, architecture=None):
        if architecture == MODELS[1]:
            raise PluginError("the vLLM model is broken.", hint="Reinstall it.")
        return ()

    monkeypatch.setattr(contract, "missing", missing)
    (found,) = _contract(MODELS)
    assert (found.name, found.status, found.fix) == (f"contract: {MODELS[1]}", "warning", "Reinstall it.")


def test_a_vllm_without_our_models_is_told_which_are_looked_for():
    found = _activation((), trying=False)
    assert found.status == "failure"
    assert (
        found.detail == f"vLLM has none of the models that visionaccel serves: {', '.join(architectures.ARCHITECTURES)}"
    )
    assert "Install a release of vLLM" in found.fix


def test_only_the_models_that_are_not_replaced_are_named(monkeypatch):
    monkeypatch.setattr(architectures, "is_replaced", lambda name: name == MODELS[0])
    assert _activation(MODELS, trying=False).detail == f"vLLM makes {MODELS[1]} from its own class"


def test_a_backend_that_is_set_for_the_look_only_is_told(monkeypatch):
    monkeypatch.setattr(architectures, "is_replaced", lambda name: True)
    assert "once VISIONACCEL_BACKEND is set" in _activation(MODELS, trying=True).detail
    assert "once" not in _activation(MODELS, trying=False).detail
