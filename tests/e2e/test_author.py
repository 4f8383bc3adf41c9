"""An author's first ten minutes, as the documentation tells them: generated, edited, proved, answering in vLLM."""

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import forked
from doc_pages import ROOT, Block, blocks
from visionaccel_bench.server import quiet_environment

PAGE = ROOT / "docs" / "writing-a-backend.md"
MOST_LINES = 40


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of a fresh virtual environment that sees this one's packages, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("author") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    here = sysconfig.get_paths()["purelib"]
    site = next(folder.glob("lib/python*/site-packages"))
    # Its own packages come first; those of this one are editable and so need their own .pth files read.
    (site / "seen.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    commands = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pip = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    return quiet_environment(pip) | {"PATH": commands, "VIRTUAL_ENV": str(folder)}


def run(block: Block, folder: Path, environment: dict[str, str], checkpoint: Path) -> str:
    """Types the commands of a block; a `cd` lasts. Returns what they print."""
    said = []
    for line in block.code.splitlines():
        words = shlex.split(line.removeprefix("$ "))
        if words[0] == "cd":
            folder = folder / words[1]
            continue
        if words[:2] == ["visionaccel", "demo"]:
            said.append(demo(words[1:], folder, environment))
            continue
        if words[0] in ("visionaccel", "pytest"):  # scripts of the other environment start its own python
            module = {"visionaccel": "-c import sys; from visionaccel.cli import main; main()", "pytest": "-m pytest"}
            flag, _, code = module[words[0]].partition(" ")
            words = ["python", flag, code, *words[1:]]
        words = [str(checkpoint) if word == "path/to/checkpoint" else word for word in words]
        done = subprocess.run(
            words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-6000:]}"
        said.append(done.stdout)
    return "\n".join(said)


def demo(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """The command with its servers as forks, which are of this environment and see the project in the other one too."""
    (site,) = Path(environment["VIRTUAL_ENV"]).glob("lib/python*/site-packages")
    command = [sys.executable, str(Path(sys.executable).with_name("visionaccel")), *arguments]
    log = folder / "demo.log"
    status = forked.run(command, environment | {"PYTHONPATH": f"{site}{os.pathsep}{folder}"}, log, folder=folder)
    said = log.read_text()
    assert status == 0, said[-6000:]
    return said


def test_a_backend_is_generated_edited_proved_and_answers(environment, digits, tmp_path):
    first, second = (b for b in blocks(PAGE) if b.language == "console" and b.mark == "executed in tests/e2e")
    (edit,) = (block for block in blocks(PAGE) if block.language == "diff")
    assert sum(line.startswith("+") and not line.startswith("+++") for line in edit.code.splitlines()) < MOST_LINES

    run(first, tmp_path, environment, digits)
    project = tmp_path / "visionaccel-acme"
    subprocess.run(["git", "apply", "--verbose", "-"], input=edit.code, text=True, check=True, cwd=project)
    said = run(second, project, environment, digits)

    report = json.loads((project / "report" / "conformance-acme.json").read_text())
    assert report["badge"] == "Gold", report["missing"]
    assert "agreement: 4 of 4" in said
