"""`visionaccel doctor` next to a real vLLM: whether its vision encoder would be replaced."""

import json
import os
import subprocess

import pytest

from command_line import COMMAND

NAMES = ("VISIONACCEL_", "VLLM_PLUGINS", "VLLM_VISION_NPU_")


def of_vllm(**environment):
    """What the command finds of vLLM, by what was looked at; it fails for nothing that vLLM lacks."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(NAMES)}
    done = subprocess.run(
        [*COMMAND, "doctor", "--backend", "onnxrt", "--limit", "120", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**inherited, **environment},
    )
    assert done.stdout, done.stderr
    rows = [row for row in json.loads(done.stdout)["findings"] if row["about"] == "vLLM"]
    found = {row["what"]: row for row in rows}
    assert len(found) == len(rows), "each finding is there once"
    return found


def test_vllm_with_a_backend_makes_the_model_from_our_class():
    found = of_vllm(VISIONACCEL_BACKEND="onnxrt")
    assert {name: row["status"] for name, row in found.items()} == dict.fromkeys(
        ("release", "VISIONACCEL_BACKEND", "import", "contract", "activation"), "pass"
    )
    models, from_ours, _ = found["activation"]["found"].partition(" from visionaccel's class")
    assert from_ours
    assert "Qwen2_5_VLForConditionalGeneration" in models


def test_without_a_backend_vllm_is_left_alone_and_that_is_a_warning():
    found = of_vllm()
    assert found["VISIONACCEL_BACKEND"]["status"] == "warning"
    assert found["activation"]["status"] == "pass"
    assert "once VISIONACCEL_BACKEND is set" in found["activation"]["found"]


def test_a_backend_that_is_not_installed_would_keep_vllm_from_starting():
    found = of_vllm(VISIONACCEL_BACKEND="onnxtr")["activation"]
    assert found["status"] == "failure"
    assert "vLLM would not start: no installed backend is named 'onnxtr'" in found["found"]


@pytest.mark.parametrize(("backend", "status"), [({}, "warning"), ({"VISIONACCEL_BACKEND": "onnxrt"}, "failure")])
def test_plug_ins_that_vllm_is_told_to_leave_out(backend, status):
    found = of_vllm(VLLM_PLUGINS="lora_filesystem_resolver", **backend)
    assert found["VLLM_PLUGINS"]["status"] == status
    assert "activation" not in found
