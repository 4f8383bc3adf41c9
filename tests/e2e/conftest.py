"""Real vLLM processes, started once and shared by the tests that look at their answers."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forked
from visionaccel_bench.server import quiet_environment

ASK = Path(__file__).with_name("ask.py")

Ask = Callable[..., dict[str, Any]]


def _asking(
    folders: pytest.TempPathFactory, digits: Path, run: Callable[[list[str], dict[str, str], Path], int]
) -> Ask:
    def ask(
        settings: dict[str, str],
        part: str = "matrix",
        checkpoint: Path = digits,
        connector: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        folder = folders.mktemp("answers")
        target, log = folder / "answers.json", folder / "log"
        command = [sys.executable, str(ASK), str(checkpoint), part, str(target)]
        if connector is not None:
            command.append(json.dumps(connector))
        status = run(command, quiet_environment(settings), log)
        answers = json.loads(target.read_text()) if target.exists() else {}
        return {**answers, "status": status, "log": log.read_text(errors="replace")}

    return ask


def _in_one(command: list[str], environment: dict[str, str], log: Path) -> int:
    return forked.run(command, environment | forked.WORKER_IN_ENGINE, log)


def _in_processes(command: list[str], environment: dict[str, str], log: Path) -> int:
    # Short, as socket names must be, and vLLM leaves them behind.
    with tempfile.TemporaryDirectory() as sockets:
        return forked.run(command, environment | {"VLLM_RPC_BASE_PATH": sockets}, log)


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Ask:
    """Run `ask.py` with some settings; returns what it wrote, its exit status, and its output as `log`.

    All of vLLM is in one process, which starts faster: for what does not hang on its processes.
    """
    return _asking(tmp_path_factory, digits, _in_one)


@pytest.fixture(scope="session")
def ask_processes(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Ask:
    """As `ask`, and scheduler and workers have processes of their own, as vLLM has them on a CPU."""
    return _asking(tmp_path_factory, digits, _in_processes)


@pytest.fixture(scope="session")
def stock(ask_processes: Ask) -> dict[str, Any]:
    """The answers of vLLM with no backend named."""
    answers = ask_processes({})
    assert answers["status"] == 0, answers["log"][-4000:]
    return answers


@pytest.fixture(
    scope="session",
    params=[("VISIONACCEL_BACKEND", "onnxrt", "pipelined"), ("VLLM_VISION_NPU_BACKEND", "torch_ref", "in-line")],
    ids=lambda param: param[1],
)
def accelerated(request: pytest.FixtureRequest, ask_processes: Ask) -> dict[str, Any]:
    """The answers of vLLM with its encoder on a backend, named by the current or the former variable, in each mode.

    Pipelined is what one gets without asking.
    """
    variable, backend, mode = request.param
    answers = ask_processes({variable: backend} | ({"VISIONACCEL_MODE": "inline"} if mode == "in-line" else {}))
    assert answers["status"] == 0, answers["log"][-4000:]
    return {**answers, "variable": variable, "backend": backend, "mode": mode}
