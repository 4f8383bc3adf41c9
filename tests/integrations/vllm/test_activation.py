"""However an engine's configuration is made, this package has seen it, or the model that is made from it says so."""

import json
import sys
import warnings
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from command_line import run_command
from visionaccel.bundle import ProgramRequest, export_bundle
from visionaccel.core.grid import Grid
from visionaccel.core.program import FixedGrid
from visionaccel.encoder import open_tower
from visionaccel.errors import ConfigurationError
from visionaccel_bench.server import quiet_environment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    import vllm
    from vllm import ModelRegistry
    from vllm.config import LoadConfig, LoRAConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo

    from visionaccel.integrations.vllm import activation, encoder_source
    from visionaccel.integrations.vllm import model as models
    from visionaccel.integrations.vllm.compat import architectures, engine_config, serving
    from visionaccel.integrations.vllm.inline import visual

pytestmark = pytest.mark.filterwarnings("ignore")

Accelerated = getattr(models, architectures.derived_name("Qwen2_5_VLForConditionalGeneration"))
STOCK = architectures.stock_class("Qwen2_5_VLForConditionalGeneration")

EARLY = """
import json, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.engine.arg_utils import EngineArgs
from visionaccel.integrations.vllm.compat.architectures import replaced_architecture
for keywords in json.loads(sys.argv[2]):
    config = EngineArgs(model=sys.argv[1], dtype="float32", max_model_len=512, **keywords).create_engine_config()
    found = {
        "scheduler": str(config.scheduler_config.scheduler_cls),
        "prepared": "visionaccel" in config.additional_config,
        "model": replaced_architecture(config.model_config),
    }
    print("FOUND", json.dumps(found))
"""
"""Loads vLLM's plug-ins before the module that builds configurations is imported, then builds some."""


@pytest.fixture(scope="module")
def early(digits):
    """Configurations of a process that loads vLLM's plug-ins first: the usual one, and those of other architectures."""
    overrides = [{"architectures": [name]} for name in ("Qwen2_5_VLForSequenceClassification", "Qwen2_5_VLModel")]
    keywords = [{}, *({"hf_overrides": override, "runner": "pooling"} for override in overrides)]
    environment = quiet_environment({"VISIONACCEL_BACKEND": "onnxrt"})
    done = run_command("-c", EARLY, digits, json.dumps(keywords), environment=environment)
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == len(keywords), done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in lines]


def test_configurations_are_prepared_when_plug_ins_are_loaded_before_engine_args_is_imported(early):
    assert early[0]["prepared"]
    assert early[0]["scheduler"].startswith("visionaccel.")


def test_an_architecture_is_resolved_as_vllm_resolves_it(early):
    for found in early[1:]:
        assert found["prepared"]
        assert found["model"] == "Qwen2_5_VLForConditionalGeneration"


def test_an_architecture_that_another_plug_in_registers_with_vllms_own_class_is_refused(config, monkeypatch):
    assert engine_config.served_model(config).replaces == "Qwen2_5_VLForConditionalGeneration"
    own = _LazyRegisteredModel("vllm.model_executor.models.qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration")
    monkeypatch.setitem(ModelRegistry.models, "AliasForConditionalGeneration", own)
    monkeypatch.setattr(config.model_config, "_architecture", "AliasForConditionalGeneration")
    assert engine_config.served_model(config).replaces is None
    with pytest.raises(ConfigurationError, match=r"is set, but the vision encoder of .* is not implemented"):
        activation.check_engine(config)


RETRY = """
import os, sys
from vllm.engine.arg_utils import EngineArgs
from visionaccel.integrations.vllm.compat.architectures import replaced_architecture
for backend in ("missing", "missing", "onnxrt"):
    os.environ["VISIONACCEL_BACKEND"] = backend
    try:
        config = EngineArgs(model=sys.argv[1], dtype="float32", max_model_len=512).create_engine_config()
        print("FOUND", replaced_architecture(config.model_config), "visionaccel" in config.additional_config)
    except Exception as error:
        print("FOUND", type(error).__name__)
"""
"""What a notebook does in which a wrong setting is corrected after an error."""


def test_after_an_activation_that_failed_the_next_one_fails_or_succeeds_and_is_not_left_out(digits):
    done = run_command("-c", RETRY, digits, environment=quiet_environment({}))
    found = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    *failed, served = found
    assert failed == ["UnknownBackendError"] * 2, done.stderr[-2000:]
    assert served == "Qwen2_5_VLForConditionalGeneration True"


def test_flags_that_vllm_cached_under_another_release_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    architecture = "Qwen2_5_VLForConditionalGeneration"

    def entry():
        """vLLM's registration of the class, as a process of the release that `vllm.__version__` names makes it."""
        stock = _LazyRegisteredModel("vllm.model_executor.models.qwen2_5_vl", architecture)
        monkeypatch.setitem(ModelRegistry.models, architecture, stock)
        architectures.register_models()
        return ModelRegistry.models[architecture]

    ours = entry()
    source = Path(sys.modules[ours.load_model_cls().__module__].__file__)
    flags = replace(_ModelInfo.from_model_cls(ours.load_model_cls()), supports_multimodal=False)
    ours._save_modelinfo_to_cache(flags, ours._get_modelinfo_module_hash(source))
    assert not ours.inspect_model_cls().supports_multimodal, "the file is what vLLM believes"
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    theirs = entry()
    assert theirs.load_model_cls().__mro__[2] is ours.load_model_cls().__mro__[2], "derived from the same class"
    assert theirs._load_modelinfo_from_cache(theirs._get_modelinfo_module_hash(source)) is None


@pytest.fixture(scope="module")
def prepared(digits):
    """An engine's configuration, prepared by this package."""
    with pytest.MonkeyPatch.context() as patch:  # without a backend: vLLM would activate us for every later test
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        architectures.register_models()
        found = EngineArgs(model=str(digits), dtype="float32", max_model_len=512).create_engine_config()
        engine_config.mark_prepared(found)
        return found


@pytest.fixture
def config(prepared, monkeypatch):
    """A copy of it."""
    monkeypatch.setenv("VISIONACCEL_BACKEND", "onnxrt")
    return copy(prepared)


@pytest.fixture
def limited(digits, tmp_path, monkeypatch):
    """A bundle of one grid is set."""
    export_bundle(open_tower(digits), tmp_path / "fixed", [ProgramRequest(FixedGrid(Grid(1, 12, 12)))])
    monkeypatch.setenv("VISIONACCEL_BUNDLE", str(tmp_path / "fixed"))


def test_a_configuration_that_was_not_prepared_is_said_where_its_model_is_made(config, caplog):
    activation.check_engine(config)
    assert "was not made by vLLM's EngineArgs" not in caplog.text
    config.additional_config = {}
    activation.check_engine(config)
    assert "was not made by vLLM's EngineArgs" in caplog.text


def test_without_preparation_a_bundle_that_needs_fitted_images_is_refused(config, limited, monkeypatch):
    activation.check_engine(config)
    config.additional_config = {}
    with pytest.raises(ConfigurationError, match="was not made by vLLM's EngineArgs"):
        activation.check_engine(config)
    monkeypatch.setenv("VISIONACCEL_FALLBACK", "torch_ref")
    monkeypatch.setenv("VISIONACCEL_FIT", "none")
    activation.check_engine(config)


@pytest.mark.parametrize("given", [None, SimpleNamespace(compute_hash=lambda: "1")])
def test_a_configuration_that_has_no_place_for_a_mark_is_not_taken_to_be_prepared(config, limited, given):
    config.additional_config = given
    engine_config.mark_prepared(config)
    assert not engine_config.is_prepared(config)
    with pytest.raises(ConfigurationError, match="has an additional_config that is not a dict"):
        activation.check_engine(config)


def test_the_rust_front_end_with_a_bundle_that_needs_fitted_images_is_refused(config, limited, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ConfigurationError, match="with VLLM_USE_RUST_FRONTEND, images are not fitted"):
        activation.check_engine(config)


def test_the_rust_front_end_is_refused_for_pooling_where_only_the_python_one_reports_failed_images(config, monkeypatch):
    monkeypatch.setattr(config.model_config, "runner_type", "pooling")
    activation.check_engine(config)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    monkeypatch.setattr(serving, "takes_request_errors", lambda: True, raising=False)
    activation.check_engine(config)
    monkeypatch.setattr(serving, "takes_request_errors", lambda: False)
    with pytest.raises(ConfigurationError, match="pooling models cannot be served with VLLM_USE_RUST_FRONTEND"):
        activation.check_engine(config)


def test_options_of_the_server_that_cut_images_in_another_way_are_refused_at_the_start(config, monkeypatch):
    monkeypatch.setattr(config.model_config.multimodal_config, "mm_processor_kwargs", {"patch_size": 14})
    activation.check_engine(config)
    monkeypatch.setattr(
        config.model_config.multimodal_config, "mm_processor_kwargs", {"images_kwargs": {"merge_size": 1}}
    )
    with pytest.raises(ConfigurationError, match=r"--mm-processor-kwargs sets merge_size=1"):
        activation.check_engine(config)


def test_adapters_for_the_vision_tower_are_refused_at_the_start(config):
    config.lora_config = LoRAConfig(enable_tower_connector_lora=False)
    activation.check_engine(config)
    config.lora_config = LoRAConfig(enable_tower_connector_lora=True)
    with pytest.raises(ConfigurationError, match="--enable-tower-connector-lora applies LoRA adapters to vLLM's own"):
        activation.check_engine(config)


def test_a_model_whose_weights_vllm_loads_from_elsewhere_is_refused_before_it_loads_them(config):
    config.load_config = LoadConfig(load_format="runai_streamer")
    with pytest.raises(
        ConfigurationError, match="with --load-format runai_streamer, vLLM loads the weights with its Run"
    ):
        activation.check_engine(config)


def test_the_vision_part_of_an_adapter_is_ignored(tmp_path):
    tensors = {}
    for layer in ("model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.qkv", "model.visual.blocks.1.attn.proj"):
        for part in "AB":
            tensors[f"base_model.model.{layer}.lora_{part}.weight"] = np.ones((4, 4), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "qkv", "proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    def load(prefixes):
        """The adapter, as a worker loads it for a model whose language model alone has layers for it."""
        return LoRAModel.from_local_checkpoint(
            str(tmp_path),
            {"q_proj"},
            PEFTHelper.from_local_dir(str(tmp_path), None),
            lora_model_id=1,
            device="cpu",
            weights_mapper=Accelerated.hf_to_vllm_mapper,
            skip_prefixes=prefixes,
        )

    with pytest.raises(ValueError, match="expected target modules in"):
        load(None)
    assert list(load(Accelerated.lora_skip_prefixes).loras) == ["language_model.model.layers.0.self_attn.q_proj"]


def test_a_model_compares_vision_weights_after_the_start_and_not_while_it_is_made(config, digits, monkeypatch):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    model = Accelerated.__new__(Accelerated)
    torch.nn.Module.__init__(model)
    model.visual = visual.AcceleratedTower(engine_config.served_model(config))
    model._served_config = config
    taken = []
    monkeypatch.setattr(STOCK, "load_weights", lambda self, weights: taken.extend(n for n, _ in weights))
    weights = {name: torch.from_numpy(weight) for name, weight in load_file(digits / "model.safetensors").items()}
    changed = {**weights, "visual.blocks.0.attn.qkv.bias": torch.ones(288)}
    model.load_weights(weights.items())
    assert taken == [name for name in weights if not name.startswith("visual.")]
    with pytest.raises(ConfigurationError, match="was given new weights for the vision encoder"):
        model.load_weights(changed.items())

    class Loader(DefaultModelLoader):
        def __init__(self):
            pass

        def load_model(self):
            return model.load_weights(changed.items())

    Loader().load_model()


def test_a_reload_that_is_refused_leaves_the_language_model_whole(config, digits, monkeypatch):
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def load(self, weights):
        for name, weight in weights:
            parameter = self.get_parameter(name)
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
        return set()

    class Runner(GPUModelRunner):
        def __init__(self, model):
            self.vllm_config, self.model_config, self.load_config = config, config.model_config, config.load_config
            self.model = model

        def get_model(self):
            return self.model

    monkeypatch.setattr(STOCK, "load_weights", load)
    model = Accelerated.__new__(Accelerated)
    torch.nn.Module.__init__(model)
    model._served_config = config
    model.visual = visual.AcceleratedTower(engine_config.served_model(config))
    model.head, model.rotary = torch.nn.Linear(2, 2, bias=False), torch.nn.Module()
    model.rotary.register_buffer("table", torch.full((3,), 5.0))  # no checkpoint has it
    record_metadata_for_reloading(model)
    changed = {"head.weight": torch.ones(2, 2), "visual.blocks.0.attn.qkv.bias": torch.ones(288)}
    with pytest.raises(ConfigurationError, match="was given new weights for the vision encoder"):
        Runner(model).reload_weights(weights_iterator=iter(changed.items()))
    assert model.rotary.table.tolist() == [5, 5, 5]
    assert model.head.weight.tolist() == [[1, 1], [1, 1]]


def test_an_override_of_the_towers_epsilon_is_refused(config, monkeypatch):
    served_model = engine_config.served_model
    monkeypatch.setattr(engine_config, "served_model", lambda given: replace(served_model(given), epsilon=1e-5))
    with pytest.raises(ConfigurationError, match=r"rms_norm_eps=1e-05"):
        activation.check_engine(config)


def test_another_base_of_the_towers_rotary_positions_is_refused_because_vllm_would_ignore_it(config, monkeypatch):
    monkeypatch.setattr(config.model_config.hf_config.vision_config, "rope_theta", 500.0, raising=False)
    monkeypatch.setattr(config.model_config.hf_config.vision_config, "rope_parameters", None, raising=False)
    with pytest.raises(ConfigurationError, match=r"rope_theta=500, but vLLM's .* ignores that and computes with 10000"):
        activation.check_engine(config)


def test_the_epsilon_of_the_familys_description_counts(config, monkeypatch):
    described = SimpleNamespace(spec=SimpleNamespace(norm1=SimpleNamespace(epsilon=1e-5), rotary_base=10000.0))
    monkeypatch.setattr(encoder_source, "served_tower", lambda served, stored: described)
    monkeypatch.setattr(config.model_config.hf_config, "rms_norm_eps", 1e-6, raising=False)
    with pytest.raises(ConfigurationError, match=r"rms_norm_eps=1e-06 with the served .*, but only 1e-05"):
        activation.check_engine(config)
    monkeypatch.setattr(config.model_config.hf_config, "rms_norm_eps", 1e-5)
    activation.check_engine(config)
