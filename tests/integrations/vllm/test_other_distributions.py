"""Models of other distributions: rows by entry point, whichever plug-in vLLM loads first."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from fake_plugins import find_each_time, install_all
from visionaccel.errors import PluginError
from visionaccel.integrations.vllm import Architecture

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM and what it imports use deprecated parts of torch
    from vllm import ModelRegistry

    from visionaccel.integrations.vllm.compat import architectures, contract

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own deprecations

QWEN = "Qwen2VLForConditionalGeneration"
OTHER = "OtherForConditionalGeneration"
ROW = f"""
from visionaccel.integrations.vllm import Architecture
ROW = Architecture("vllm.model_executor.models.qwen2_vl:{QWEN}", towers=("Qwen2VisionTransformer",))
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the Python path; rows in it are found from now on."""
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("other_rows", "more_rows"):  # an earlier test's
        monkeypatch.delitem(sys.modules, module, raising=False)
    find_each_time(monkeypatch, architectures.ARCHITECTURES)
    return tmp_path


def add(site, source, architecture=OTHER, distribution="other-rows"):
    module = distribution.replace("-", "_")
    install_all(site, distribution, {architectures.GROUP: {architecture: f"{module}:ROW"}}, source)


def test_a_row_is_found_by_its_architecture_and_its_contract_is_checked(site):
    add(site, ROW)
    assert set(architectures.ARCHITECTURES) > {OTHER, QWEN}
    assert architectures.ARCHITECTURES[OTHER] == architectures.ARCHITECTURES[QWEN]
    assert contract.entries_of(contract.Feature.INLINE, OTHER) == contract.entries_of(contract.Feature.INLINE, QWEN)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no such library')", "cannot be loaded: RuntimeError: no such library"),
        ("ROW = 3", r"is not a visionaccel\.integrations\.vllm\.Architecture"),
        ("from visionaccel.integrations.vllm import Architecture; ROW = Architecture()", "cannot be loaded: TypeError"),
    ],
)
def test_a_broken_row_is_an_error_of_its_architecture_alone(site, monkeypatch, source, said):
    add(site, source)
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    architectures.register_models()
    assert architectures.is_replaced(QWEN)
    with pytest.raises(PluginError, match=rf"vLLM model other_rows:ROW of other-rows 1\.0, for .* {OTHER}, {said}"):
        architectures.ARCHITECTURES[OTHER]


def test_a_row_for_a_model_of_ours_is_refused(site):
    add(site, ROW, QWEN)
    with pytest.raises(PluginError, match=rf"{QWEN} is provided by both visionaccel and other-rows 1\.0"):
        architectures.ARCHITECTURES[QWEN]


def test_a_class_that_is_registered_later_is_replaced_as_soon_as_it_is(site, monkeypatch):
    add(site, ROW)
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.setattr(architectures, "_stock", {})
    architectures.register_models()
    assert not architectures.is_replaced(OTHER)
    for name in (OTHER, "ThirdForConditionalGeneration"):
        ModelRegistry.register_model(name, f"vllm.model_executor.models.qwen2_vl:{QWEN}")
    assert architectures.is_replaced(OTHER)
    assert not architectures.is_replaced("ThirdForConditionalGeneration")
    model = SimpleNamespace(architecture=OTHER)
    monkeypatch.setattr(type(ModelRegistry), "_normalize_arch", lambda self, name, config: name)
    assert architectures.replaced_architecture(model) == OTHER
    assert architectures.stock_class(OTHER).__name__ == QWEN


def test_the_type_of_rows_is_imported_without_vllm_and_torch():
    code = (
        "import sys, visionaccel.integrations.vllm as v; v.Architecture; "
        "sys.exit(bool({'vllm', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    assert Architecture.__module__ == "visionaccel.integrations.vllm.architecture"
