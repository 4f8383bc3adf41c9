"""Classes that are derived from what vLLM registered for an architecture; no model has one in the source."""

import os
import pickle
import sys
import types
import warnings

import pytest

from command_line import run_command
from visionaccel.errors import ConfigurationError
from visionaccel.families import family_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    import torch
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    from visionaccel.integrations.vllm import model
    from visionaccel.integrations.vllm.compat import architectures
    from visionaccel.integrations.vllm.processing import FittedInfo, FittedProcessor

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations


QWEN = "Qwen2_5_VLForConditionalGeneration"


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_a_model_and_its_processing_are_derived_from_what_vllm_registered(architecture):
    stock = architectures.stock_class(architecture)
    derived = getattr(model, architectures.derived_name(architecture))
    assert derived.__mro__[:3] == (derived, model.Accelerated, stock)
    info, processor, dummy_inputs = architectures.processing_of(derived)
    assert (info.__mro__[1], processor.__mro__[1]) == (FittedInfo, FittedProcessor)
    assert (info.__bases__[1], processor.__bases__[1], dummy_inputs) == architectures.processing_of(stock)
    assert (derived.supports_mm_device_do_normalize, derived.supports_encoder_cudagraph) == (False, False)
    assert architectures.processing_of(stock)[0] is not info, "vLLM's own class is left alone"
    for kind in (derived, info, processor):
        assert kind is getattr(model, kind.__qualname__)
        assert pickle.loads(pickle.dumps(kind)) is kind


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_only_the_prefixes_of_the_architectures_family_tell_vision_tensors(architecture):
    derived = getattr(model, architectures.derived_name(architecture))
    instance = derived.__new__(derived)
    places = ("visual.", "model.visual.", "vlm.model.visual.", "thinker.visual.", "vision_tower.", "visuals.", "model.")
    kept = [name for name, _ in instance._without_tower(((f"{place}x", None) for place in places), None)]
    ours = family_for(architecture).prefixes
    assert kept == [f"{place}x" for place in places if place not in ours]
    assert len(kept) < len(places)


def test_speculative_decoding_takes_a_derived_model_for_vllms_own():
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    derived = getattr(model, architectures.derived_name(QWEN))
    instance = derived.__new__(derived)
    torch.nn.Module.__init__(instance)
    assert SpecDecodeBaseProposer.get_model_name(None, instance) == QWEN


UNPICKLE = """
import pickle, sys
for kind in pickle.loads(bytes.fromhex(sys.argv[1])):
    print("FOUND", kind.__module__, kind.__qualname__, [base.__name__ for base in kind.__mro__[1:3]])
"""


def test_derived_classes_are_unpickled_in_a_process_that_has_derived_none():
    derived = getattr(model, architectures.derived_name(QWEN))
    kinds = [*reversed(architectures.processing_of(derived)[:2]), derived]
    done = run_command("-c", UNPICKLE, pickle.dumps(kinds).hex(), environment=os.environ)
    found = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found == [
        f"{kind.__module__} {kind.__qualname__} {[base.__name__ for base in kind.__mro__[1:3]]}" for kind in kinds
    ], done.stderr[-2000:]


def test_other_names_are_not_there():
    ours = architectures.derived_name(QWEN)
    suffixed = [f"{ours}{suffix}" for suffix in ("InfoInfo", "ProcessorInfo", "Dummy", "_")]
    for name in (QWEN, f"{QWEN}__1_0__{'a' * 12}", f"{QWEN}__Info", "Other__1_0__a", "missing", *suffixed):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(model, name)


def test_a_model_that_this_vllm_does_not_have_is_not_derived(monkeypatch):
    name = architectures.derived_name(QWEN)
    vars(model).pop(name, None)
    monkeypatch.setattr(architectures, "_stock", {})
    monkeypatch.setattr(ModelRegistry, "models", {})
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        getattr(model, name)


@pytest.mark.parametrize("package", [False, True])
def test_the_registered_name_changes_with_the_source_of_a_third_partys_class(monkeypatch, tmp_path, package):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(architectures, "_stock", {})
    source = tmp_path / "third" / ("models/part.py" if package else "models.py")
    source.parent.mkdir(parents=True)
    if package:
        (source.parent / "__init__.py").write_text("from .part import Model\n")
    names = []
    for text in ("Model = 1", "Model = 2", "Model = 1"):
        source.write_text(text)
        monkeypatch.setitem(ModelRegistry.models, QWEN, _LazyRegisteredModel("third.models", "Model"))
        names.append(architectures.derived_name(QWEN))
    assert names[0] == names[2] != names[1]
    monkeypatch.setitem(ModelRegistry.models, QWEN, _LazyRegisteredModel("third.models", "Other"))
    assert architectures.derived_name(QWEN) not in names
    assert "third" not in sys.modules, "vLLM imports it when it needs it"


def test_an_adapter_skips_what_the_stock_class_skips_and_the_towers_weights(monkeypatch):
    stock = architectures.stock_class(QWEN)
    monkeypatch.setattr(stock, "lora_skip_prefixes", ["mtp."], raising=False)
    name = architectures.derived_name(QWEN)
    kept = vars(model).pop(name, None)
    try:
        assert getattr(model, name).lora_skip_prefixes == ["mtp.", "model.visual.", "visual."]
    finally:
        vars(model).pop(name)
        if kept is not None:
            setattr(model, name, kept)


def test_only_what_vllm_has_is_registered(monkeypatch):
    monkeypatch.setattr(ModelRegistry, "models", {})
    architectures.register_models()
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
    with architectures.swapped_towers(derived, ("Tower",), "ours"):
        assert (below.Tower, below.other, above.Renamed) == ("ours", dict, "ours")
    with pytest.raises(ZeroDivisionError), architectures.swapped_towers(derived, ("Tower",), "ours"):
        _ = 1 / 0
    assert (below.Tower, above.Renamed) == (Tower, Tower)


def test_a_model_without_images_and_videos_still_embeds_sound():
    from vllm.model_executor.models.utils import StageMissingLayer

    # vLLM hides the tower in this, and Qwen3-Omni's `embed_input_ids` asks it for its levels.
    assert StageMissingLayer("vision_tower", model._NoTower()).deepstack_visual_indexes is None


def test_a_model_that_makes_its_tower_from_another_class_does_not_start(monkeypatch):
    class Stock(torch.nn.Module):
        def __init__(self, *, vllm_config, prefix):
            super().__init__()

    ours = type("Ours", (model.Accelerated, Stock), {"accelerated": "Qwen2_5_VLForConditionalGeneration"})
    monkeypatch.setattr(model, "check_engine", lambda config: None)
    with pytest.raises(ConfigurationError, match="from a class other than Qwen2_5_VisionTransformer"):
        ours(vllm_config=None)
