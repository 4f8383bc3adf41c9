"""Classes that are derived from what vLLM registered for an architecture; no model has one in the source."""

import pickle
import sys
import types
import warnings

import pytest

from visionaccel.errors import ConfigurationError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    import torch
    from vllm import ModelRegistry

    from visionaccel.integrations.vllm import compat, model
    from visionaccel.integrations.vllm.processing import FittedInfo, FittedProcessor

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations


@pytest.mark.parametrize("architecture", compat.ARCHITECTURES)
def test_a_model_and_its_processing_are_derived_from_what_vllm_registered(architecture):
    stock = compat.stock_class(architecture)
    derived = getattr(model, f"{architecture}__1_0__{'a' * 12}")
    assert derived.__mro__[:3] == (derived, model.Accelerated, stock)
    info, processor, dummy_inputs = compat.processing_of(derived)
    assert (info.__mro__[1], processor.__mro__[1]) == (FittedInfo, FittedProcessor)
    assert (info.__bases__[1], processor.__bases__[1], dummy_inputs) == compat.processing_of(stock)
    assert (derived.supports_mm_device_do_normalize, derived.supports_encoder_cudagraph) == (False, False)
    assert compat.processing_of(stock)[0] is not info, "vLLM's own class is left alone"
    assert derived is getattr(model, derived.__name__)
    for kind in (derived, info, processor):
        assert pickle.loads(pickle.dumps(kind)) is kind


def test_other_names_are_not_there():
    for name in ("Qwen2_5_VLForConditionalGeneration", "Other__1_0__a", "missing"):
        with pytest.raises(AttributeError, match=name):
            getattr(model, name)


def test_only_what_vllm_has_is_registered(monkeypatch):
    monkeypatch.setattr(ModelRegistry, "models", {})
    compat.register_models("visionaccel.integrations.vllm.model")
    assert ModelRegistry.models == {}


class Tower:
    pass


def planted(monkeypatch, name, **names):
    """A module with a class in it that a constructor could find."""
    module = types.ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_tower_is_replaced_in_the_module_of_every_base_and_under_any_name(monkeypatch):
    below = planted(monkeypatch, "below", Tower=Tower, other=dict)
    above = planted(monkeypatch, "above", Renamed=Tower)
    base = type("Base", (), {"__module__": "below"})
    derived = type("Derived", (base,), {"__module__": "above"})
    with compat.swapped_towers(derived, ("Tower",), "ours"):
        assert (below.Tower, below.other, above.Renamed) == ("ours", dict, "ours")
    with pytest.raises(ZeroDivisionError), compat.swapped_towers(derived, ("Tower",), "ours"):
        _ = 1 / 0
    assert (below.Tower, above.Renamed) == (Tower, Tower)


def test_a_model_that_makes_its_tower_from_another_class_does_not_start(monkeypatch):
    class Stock(torch.nn.Module):
        def __init__(self, *, vllm_config, prefix):
            super().__init__()

    ours = type("Ours", (model.Accelerated, Stock), {"accelerated": "Qwen2_5_VLForConditionalGeneration"})
    monkeypatch.setattr(model, "check_engine", lambda config: None)
    with pytest.raises(ConfigurationError, match="from another class than Qwen2_5_VisionTransformer, so"):
        ours(vllm_config=None)
