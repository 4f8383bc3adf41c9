"""What users type first: installing from the repository into a fresh environment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path):
    """The python of a fresh virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    return tmp_path / "venv" / "bin" / "python"


def test_the_extra_installs_core_and_plug_in_without_torch(environment, tiny):
    subprocess.run([environment, "-m", "pip", "install", "--quiet", f"{ROOT}[onnxrt,cli]"], check=True, timeout=600)
    command = environment.with_name("visionaccel")
    run = subprocess.run([command, "explain", tiny, "--json"], check=True, capture_output=True, text=True)
    verdicts = [(c["backend"], c["verdict"]) for c in json.loads(run.stdout)["candidates"]]
    assert verdicts == [("onnxrt", "chosen")]
    code = "import importlib.util as u; assert not u.find_spec('torch') and not u.find_spec('vllm')"
    subprocess.run([environment, "-c", code], check=True)
