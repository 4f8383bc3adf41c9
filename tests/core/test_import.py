"""Importing the package costs next to nothing."""

import json
import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return set(json.loads(output))


def test_importing_the_package_loads_no_array_library_or_runtime():
    heavy = {"torch", "onnxruntime", "vllm", "numpy", "pydantic", "onnx", "transformers"}
    assert not modules_after("import visionaccel") & heavy


def test_an_encoder_needs_no_reader_of_settings_or_command_line():
    loaded = modules_after("from visionaccel import open_encoder")
    assert not loaded & {"pydantic_settings", "typer", "onnx", "torch", "transformers"}


def test_the_vllm_entry_point_loads_neither_torch_nor_vllm_while_no_backend_is_named(monkeypatch):
    monkeypatch.delenv("VISIONACCEL_BACKEND", raising=False)
    loaded = modules_after("from visionaccel.integrations.vllm import register; register()")
    assert not loaded & {"torch", "vllm", "onnxruntime", "transformers", "pydantic", "numpy"}


def test_plug_in_modules_load_no_runtime_until_probed():
    loaded = modules_after(
        "import visionaccel_flexmlrt, visionaccel_onnxrt, visionaccel_torch_ref, visionaccel_testing.simulated"
    )
    assert not loaded & {"torch", "onnxruntime", "openvino", "transformers"}


def test_public_names_resolve_and_unknown_ones_do_not():
    import visionaccel

    assert all(getattr(visionaccel, name) for name in visionaccel.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = visionaccel.nonsense


def test_the_command_loads_no_runtime_client_or_plotter():
    loaded = modules_after("import visionaccel.cli.app")
    assert not loaded & {"torch", "vllm", "onnxruntime", "transformers", "openai", "matplotlib", "PIL"}
