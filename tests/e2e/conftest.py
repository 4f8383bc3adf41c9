"""Real vLLM processes, started once and shared by the tests that look at their answers."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visionaccel.integrations.vllm.server import quiet_environment

ASK = Path(__file__).with_name("ask.py")
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Callable[..., dict[str, Any]]:
    """Run `ask.py` with some settings; returns what it wrote, and its output as `log`."""

    def run(
        settings: dict[str, str],
        part: str = "matrix",
        checkpoint: Path = digits,
        site: Path | None = None,
        connector: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        target = tmp_path_factory.mktemp("answers") / "answers.json"
        paths = [str(path) for path in (site, TESTS) if path is not None]
        command = [sys.executable, str(ASK), str(checkpoint), part, str(target)]
        if connector is not None:
            command.append(json.dumps(connector))
        with tempfile.TemporaryDirectory() as sockets:  # short, as socket names must be, and vLLM leaves them behind
            own = {"PYTHONPATH": os.pathsep.join(paths), "VLLM_RPC_BASE_PATH": sockets}
            done = subprocess.run(
                command,
                env=quiet_environment(settings) | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=600,
            )
        answers = json.loads(target.read_text()) if target.exists() else {}
        return {**answers, "status": done.returncode, "log": done.stdout}

    return run


@pytest.fixture(scope="session")
def stock(ask: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The answers of vLLM with no backend named."""
    answers = ask({})
    assert answers["status"] == 0, answers["log"][-4000:]
    return answers


@pytest.fixture(
    scope="session",
    params=[("VISIONACCEL_BACKEND", "onnxrt", "pipelined"), ("VLLM_VISION_NPU_BACKEND", "torch_ref", "in-line")],
    ids=lambda param: param[1],
)
def accelerated(request: pytest.FixtureRequest, ask: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The answers of vLLM with its encoder on a backend, named by the current or the former variable, in each mode.

    Pipelined is what one gets without asking.
    """
    variable, backend, mode = request.param
    answers = ask({variable: backend} | ({"VISIONACCEL_MODE": "inline"} if mode == "in-line" else {}))
    assert answers["status"] == 0, answers["log"][-4000:]
    return {**answers, "variable": variable, "backend": backend, "mode": mode}
