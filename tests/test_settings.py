"""Settings: names, former names and values."""

import logging
import os
from pathlib import Path

import pytest

import visionaccel.settings as module
from visionaccel.errors import SettingsError
from visionaccel.integrations.vllm import BACKEND_VARIABLES
from visionaccel.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("VISIONACCEL_", "VLLM_VISION_NPU_", "VLLM_NPU_")):
            monkeypatch.delenv(name)
    monkeypatch.delenv(module._SAID, raising=False)


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
        "WEIGHTS": "mapped",
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
        weights="mapped",
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


SECONDS = r"it must be a number that is above 0 and at most 86400"
UNPRINTABLE = "characters that cannot be printed"
NOT_A_SIZE = "a size is a number with a unit, such as 512MiB"
BAD_VALUES = {
    "backend": {"onnx\x1b[31mrt": UNPRINTABLE, "onnxrt\u202e": UNPRINTABLE, "a\nb": UNPRINTABLE},
    "device": {"npu\x07": UNPRINTABLE},
    "devices": {"npu:0,npu\x9b1": UNPRINTABLE},
    "bundle": {"/models/\x1b]0;owned": UNPRINTABLE},
    "fit": {"crop": "'letterbox', 'stretch' or 'none'"},
    "mode": {"pipelined?": "'auto', 'pipelined' or 'inline'"},
    "queue_size": {
        **dict.fromkeys(["0", "-1", "65537"], "it must be a number that is above 0 and at most 65536"),
        **dict.fromkeys(["1.5", "many", "nan", "1e3"], "integer"),
    },
    "cache_size": {
        **dict.fromkeys(["1,5GiB", "5-1", "-1", "1.5.5MiB", "GiB", "2 GiB each", "nan", "inf", "1e9"], NOT_A_SIZE),
        "2PiB": "at most 1125899906842624",
    },
    "fallback": {"onnxrt,torch\x1bref": UNPRINTABLE},
    "canary": {"sometimes": "'on', 'strict' or 'off'"},
    "canary_interval": dict.fromkeys(["-1", "inf", "nan", "1e10"], "at least 0 and at most 86400"),
    "shadow": dict.fromkeys(["-0.1", "1.1", "nan", "inf"], "at least 0 and at most 1"),
    "shadow_limit": dict.fromkeys(["0", "-1", "1.5", "nan"], "above 0 and at most 1"),
    "breaker_failures": {
        **dict.fromkeys(["0", "-3", "1000001"], "above 0 and at most 1000000"), "2.5": "integer", "inf": "integer",
    },
    "breaker_seconds": dict.fromkeys(["0", "-1", "nan", "inf", "1e10"], SECONDS),
    "options": {
        "threads": "'threads' is not of the form name=value",
        "threads=1,threads=2": "'threads' is given twice",
        '{"threads": ': "Expecting value",
        '{"threads": 1, "threads": 2}': "given twice",
        '{"rate": NaN}': "NaN is not a number",
        "=1": "'=1' is not of the form name=value",
        "rate=nan": "nan is not a finite number",
        "rate=1e999": "1e999 is not a finite number",
        '{"a":' * 100_000: "nested too deeply",
        "a=" + "[" * 100_000: "nested too deeply",
        "a=" + "[" * 100 + "]" * 100: "nested too deeply",
    },
    "weights": {"shared": "'private' or 'mapped'"},
    "isolation": {"thread": "'process' or 'none'"},
    "deadline": {**dict.fromkeys(["0", "-1", "nan", "inf", "-inf", "1e10", "86401"], SECONDS), "2 minutes": "number"},
    "open_deadline": {**dict.fromkeys(["0", "-1", "nan", "inf", "1e10"], SECONDS), "1,5": "number"},
    "cpu_cores": dict.fromkeys(["3-1", "-1", "a", "0,", "0-", "1e9", "99999999"], "is not a core or core range"),
    "timing": {"perhaps": "boolean"},
    "trace": {"/tmp/\u2066trace": UNPRINTABLE},
    "metrics": {"2": "boolean"},
}  # fmt: skip
"""For each setting, values that it does not take, and what the error says of them."""


def test_every_setting_has_bad_values():
    assert {name for name, rows in BAD_VALUES.items() if rows} == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(n, v, id=f"{n}-{v[:24]!a}") for n, values in BAD_VALUES.items() for v in values]
)
def test_a_bad_value_is_refused_with_its_variable_and_what_it_takes(monkeypatch, name, value):
    monkeypatch.setenv("VISIONACCEL_" + name.upper(), value)
    with pytest.raises(SettingsError) as raised:
        load_settings()
    assert f"VISIONACCEL_{name.upper()}=" in raised.value.message
    assert BAD_VALUES[name][value] in raised.value.message
    assert raised.value.message.isprintable()
    assert len(raised.value.message) < 600


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9), ("64k", 64_000), (" 7b ", 7)],
)
def test_sizes_have_units(monkeypatch, text, size):
    monkeypatch.setenv("VISIONACCEL_CACHE_SIZE", text)
    assert load_settings().cache_size == size


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
    load_settings()
    assert caplog.text.count("Did you mean VISIONACCEL_FALLBACK?") == 1
