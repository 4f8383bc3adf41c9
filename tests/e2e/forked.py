"""Engines without processes of their own, in forks of one process that has imported vLLM: those start in seconds."""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

__all__ = ["WORKER_IN_ENGINE", "answer"]

WORKER_IN_ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""A server's worker is in its engine's process, as on a GPU, and starts sooner. An offline engine is one process."""

_LIMIT = 600
_IMPORTED = ["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "digits_vlm.samples"]


def answer(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run `ask.py` with all of vLLM in one process.

    Args:
        arguments: Its command line.
        environment: Of the process. What is read while vLLM is imported counts as the first call has it.
        log: File that its output goes to.

    Returns:
        Its exit status; that of a killed process if it took ten minutes.
    """
    environment = {**environment, **WORKER_IN_ENGINE}
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(_IMPORTED)
    with patch.dict(os.environ, environment, clear=True):
        forkserver.ensure_running()
    process = forking.Process(target=_ask, args=(list(arguments), environment, log))
    process.start()
    process.join(_LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _ask(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    import ask

    ask.main()
