"""What users type first: installing from the repository into a fresh environment."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path):
    """The python of a fresh virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    return tmp_path / "venv" / "bin" / "python"


def test_the_extra_installs_core_and_plug_in_without_torch(environment, tiny):
    subprocess.run([environment, "-m", "pip", "install", "--quiet", f"{ROOT}[onnxrt]"], check=True, timeout=600)
    command = environment.with_name("visionaccel")
    run = subprocess.run([command, "explain", tiny, "--json"], check=True, capture_output=True, text=True)
    verdicts = [(c["backend"], c["verdict"]) for c in json.loads(run.stdout)["candidates"]]
    assert verdicts == [("onnxrt", "chosen"), ("simulated", "refused")]
    code = "import importlib.util as u; assert not u.find_spec('torch') and not u.find_spec('vllm')"
    subprocess.run([environment, "-c", code], check=True)


def test_published_distributions_name_the_plug_ins_plainly(tmp_path):
    """A path of this machine in their metadata would make them useless elsewhere."""
    for target in ("sdist", "wheel"):
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", tmp_path]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True, env={**os.environ, "PLAIN_EXTRAS": "1"})
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        (information,) = (member for member in archive.getmembers() if member.name.endswith("/PKG-INFO"))
        metadata = [archive.extractfile(information).read().decode()]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata.append(archive.read(next(name for name in names if name.endswith("/METADATA"))).decode())
    for text in metadata:
        assert "Requires-Dist: visionaccel-onnxrt; extra == 'onnxrt'" in text
        assert "file://" not in text
    assert {"visionaccel/py.typed", "visionaccel/families/qwen2_5_vl/graph.py"} <= set(names)
