"""Settings: names, former names, values, and the documented table."""

import logging
import os
from pathlib import Path

import pytest

import visionaccel.settings as module
from visionaccel.errors import SettingsError
from visionaccel.integrations.vllm import BACKEND_VARIABLES
from visionaccel.settings import Settings, load_settings, settings_table

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("VISIONACCEL_", "VLLM_VISION_NPU_", "VLLM_NPU_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv(module._SAID, raising=False)
    module._warn_unknown_once.cache_clear()


def test_nothing_set_means_nothing_asked():
    assert load_settings() == Settings()
    assert load_settings().backend is None


def test_every_setting_is_read(monkeypatch):
    values = {
        "BACKEND": "onnxrt",
        "BUNDLE": "/models/tower",
        "FIT": "stretch",
        "MODE": "pipelined",
        "DEVICES": "npu:0, npu:1",
        "QUEUE_SIZE": "8",
        "CACHE_SIZE": "2GiB",
        "FALLBACK": "onnxrt, torch_ref",
        "CANARY": "strict",
        "CANARY_INTERVAL": "60",
        "SHADOW": "0.01",
        "SHADOW_LIMIT": "0.999",
        "BREAKER_FAILURES": "3",
        "BREAKER_SECONDS": "0.5",
        "OPTIONS": '{"threads": 2}',
        "ISOLATION": "process",
        "DEADLINE": "2.5",
        "OPEN_DEADLINE": "1800",
        "CPU_CORES": "0-3,8",
        "TIMING": "1",
        "TRACE": "/tmp/trace.json",
        "METRICS": "0",
    }
    assert {name.lower() for name in values} | {"device"} == set(Settings.model_fields)
    for name, value in values.items():
        monkeypatch.setenv("VISIONACCEL_" + name, value)
    assert load_settings() == Settings(
        backend="onnxrt",
        bundle=Path("/models/tower"),
        fit="stretch",
        mode="pipelined",
        devices=("npu:0", "npu:1"),
        queue_size=8,
        cache_size=2 * 2**30,
        fallback=("onnxrt", "torch_ref"),
        canary="strict",
        canary_interval=60.0,
        shadow=0.01,
        shadow_limit=0.999,
        breaker_failures=3,
        breaker_seconds=0.5,
        options={"threads": 2},
        isolation="process",
        deadline=2.5,
        open_deadline=1800.0,
        cpu_cores=frozenset({0, 1, 2, 3, 8}),
        timing=True,
        trace=Path("/tmp/trace.json"),
        metrics=False,
    )


def test_empty_variables_count_as_unset(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.setenv("VISIONACCEL_" + name.upper(), "")
    assert load_settings() == Settings()


@pytest.mark.parametrize("value", ["none", "None", "NONE"])
def test_no_fallback_can_be_said(monkeypatch, value):
    monkeypatch.setenv("VISIONACCEL_FALLBACK", value)
    assert load_settings().fallback == ()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("threads=2,provider=CPUExecutionProvider", {"threads": 2, "provider": "CPUExecutionProvider"}),
        ('{"provider_options": {"cache_dir": "a,b=c"}}', {"provider_options": {"cache_dir": "a,b=c"}}),
        (" dtype = bfloat16 , ", {"dtype": "bfloat16"}),
    ],
)
def test_options_are_pairs_or_json(monkeypatch, text, options):
    monkeypatch.setenv("VISIONACCEL_OPTIONS", text)
    assert load_settings().options == options


@pytest.mark.parametrize(
    ("old", "value", "field", "meaning"),
    [
        ("VLLM_VISION_NPU_BACKEND", "flexmlrt", "backend", "flexmlrt"),
        ("VLLM_VISION_NPU_DEVICE", "npu", "device", "npu"),
        ("VLLM_VISION_NPU_CACHE", "/cache", "bundle", Path("/cache")),
        ("VLLM_NPU_TIMING", "1", "timing", True),
        ("VLLM_NPU_ASYNC_PIPELINE", "1", "mode", "auto"),
        ("VLLM_NPU_ASYNC_PIPELINE", "0", "mode", "inline"),
    ],
)
def test_former_names_work_with_one_deprecation_line(monkeypatch, caplog, old, value, field, meaning):
    monkeypatch.setenv(old, value)
    with caplog.at_level(logging.WARNING, "visionaccel"):
        assert getattr(load_settings(), field) == meaning
        load_settings()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"{old} is deprecated; set VISIONACCEL_{field.upper()} instead."]


def test_the_vllm_entry_point_looks_at_the_variables_of_the_backend_setting(monkeypatch):
    for variable in BACKEND_VARIABLES:
        with monkeypatch.context() as one:
            one.setenv(variable, "flexmlrt")
            assert load_settings().backend == "flexmlrt"


def test_the_current_name_wins_over_the_former(monkeypatch):
    monkeypatch.setenv("VLLM_VISION_NPU_BACKEND", "old")
    monkeypatch.setenv("VISIONACCEL_BACKEND", "new")
    assert load_settings().backend == "new"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODE", "pipelined?", "VISIONACCEL_MODE='pipelined.'.*'auto', 'pipelined' or 'inline'"),
        ("CACHE_SIZE", "-1", "VISIONACCEL_CACHE_SIZE='-1'"),
        ("QUEUE_SIZE", "0", "VISIONACCEL_QUEUE_SIZE='0'"),
        ("TIMING", "perhaps", "VISIONACCEL_TIMING='perhaps'"),
        ("ISOLATION", "thread", "VISIONACCEL_ISOLATION='thread'.*'process' or 'none'"),
        ("DEADLINE", "0", "VISIONACCEL_DEADLINE='0'"),
        ("DEADLINE", "inf", "VISIONACCEL_DEADLINE='inf'"),
        ("OPEN_DEADLINE", "0", "VISIONACCEL_OPEN_DEADLINE='0'"),
        ("OPEN_DEADLINE", "nan", "VISIONACCEL_OPEN_DEADLINE='nan'"),
        ("OPTIONS", "threads", "'threads' is not of the form name=value"),
        ("OPTIONS", '{"threads": ', "VISIONACCEL_OPTIONS"),
    ],
)
def test_invalid_values_name_the_variable(monkeypatch, name, value, message):
    monkeypatch.setenv("VISIONACCEL_" + name, value)
    with pytest.raises(SettingsError, match=message):
        load_settings()


def test_one_device_or_several_are_named_not_both(monkeypatch):
    assert load_settings().wanted_devices == (None,)
    monkeypatch.setenv("VISIONACCEL_DEVICE", "npu")
    assert load_settings().wanted_devices == ("npu",)
    monkeypatch.setenv("VISIONACCEL_DEVICES", "npu:0,npu:1")
    with pytest.raises(SettingsError, match="VISIONACCEL_DEVICE or VISIONACCEL_DEVICES, not both"):
        load_settings()


def test_a_mistyped_variable_is_pointed_out(monkeypatch, caplog):
    monkeypatch.setenv("VISIONACCEL_FALBACK", "torch_ref")
    load_settings()
    assert "Did you mean VISIONACCEL_FALLBACK?" in caplog.text


def test_the_readme_holds_the_generated_table():
    assert settings_table() in README.read_text()
