"""vLLM's own tower beside a backend, and the advice that comes of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_stock_vllms_tower_is_measured_and_placement_says_what_to_do(digits):
    command = [Path(sys.executable).with_name("visionaccel"), "bench", "placement", digits, "--backend", "onnxrt"]
    done = subprocess.run(
        [*command, "--grid", "12x22", "--rounds", "2", "--json"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    ours, stock = document["measured"]["contenders"]
    assert stock["error"] is None
    assert (stock["label"], stock["precision"], stock["device"]) == ("vllm bfloat16", "bfloat16", "cpu")
    assert "vLLM 0." in stock["about"]
    (on_grid,) = stock["grids"]
    assert 0.99 < on_grid["accuracy"]["lowest_cosine"] < 1, "the same weights, in bfloat16"
    assert ours["grids"][0]["times_stock"] > 0
    (placement,) = document["placements"]
    for mode in ("inline", "pipelined"):
        offload, reason = placement[mode]["offload"], placement[mode]["reason"]
        assert reason.startswith("offload:" if offload else "do not:")
    assert placement["grids"][0]["stock_seconds"] == pytest.approx(on_grid["median_seconds"])
