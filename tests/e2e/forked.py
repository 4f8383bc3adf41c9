"""vLLM in forks of one process that has imported it: those start in seconds.

A fork is like a process that vLLM spawns, its imports aside: it has loaded no plug-in, and no thread runs in it. But
libraries have read their environment: OpenMP binds no thread to a core, and torch compiles nothing, which is vLLM's
ranking of log-probabilities otherwise. `test_server` starts vLLM as users do.
"""

import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import IO
from unittest.mock import patch

from doc_pages import ROOT
from visionaccel.core.orphans import guarded_group
from visionaccel_bench import server

__all__ = ["WORKER_IN_ENGINE", "run", "servers"]

WORKER_IN_ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""A server's worker is in its engine's process, as on a GPU, and starts sooner. An offline engine is one process."""

_LIMIT = 600
_STARTING = ("vllm.v1.engine.utils", "vllm.v1.executor.multiproc_executor")
"""vLLM's modules that start processes."""

_IMPORTED = [
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    *_STARTING,
    "digits_vlm.samples",
]


class Forked:
    """A fork that leads a process group. What it starts through vLLM, and its servers, are forks too.

    Args:
        command: What a process would be started with: this interpreter, then a script or `-m` and a module, then
            arguments.
        environment: Of the process. What is read while vLLM is imported is not from it.
        log: File that its output is added to.
        folder: Its working directory.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path) -> None:
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(_IMPORTED)
        with patch.dict(os.environ, server.quiet_environment({"TORCH_COMPILE_DISABLE": "1"}), clear=True):
            forkserver._forkserver.ensure_running()
        _, *arguments = map(str, command)
        self._process = forking.Process(target=_lead, args=(arguments, dict(environment), log, folder))
        self._process.start()
        self.pid = self._process.pid
        self._guard = ExitStack()
        self._guard.enter_context(guarded_group(self.pid))

    def exited(self) -> bool:
        """Whether it is dead."""
        return not self._process.is_alive()

    def ask_to_end(self) -> None:
        """Send it SIGTERM."""
        self._process.terminate()

    def end(self, seconds: float) -> None:
        """Give it some time to end by itself, then end it and what it started."""
        self._process.join(seconds)
        self._process.kill()
        self.reap()

    def reap(self) -> int:
        """Wait for it to die, end what it started, and return its status, or minus the signal that ended it."""
        self._process.join()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._guard.close()
        return self.status

    @property
    def status(self) -> int | None:
        """Its exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode


def run(command: Sequence[str], environment: Mapping[str, str], log: Path, *, folder: Path = ROOT) -> int:
    """Run a command as a `Forked`; its exit status, or that of a killed process if it took ten minutes."""
    process = Forked(command, environment, log, folder)
    process.end(_LIMIT)
    return process.status


@contextmanager
def servers() -> Iterator[None]:
    """While it lasts, `visionaccel_bench.server.serve` starts its servers in forks, as it does in one."""
    with patch.object(server, "ChildGroup", _Server):
        yield


class _Server(Forked):
    """Stands in for `ChildGroup` there."""

    def __init__(self, command: Sequence[str], *, output: IO[bytes], environment: Mapping[str, str]) -> None:
        super().__init__(command, environment, Path(output.name), ROOT)


class _Follower(ForkServerProcess):
    """What vLLM starts: a fork of the same process, of its starter's group, environment and log."""

    def start(self) -> None:
        self._taken = (os.getpgrp(), dict(os.environ), _Forks.log)
        super().start()

    def run(self) -> None:
        group, environment, log = self._taken
        os.setpgid(0, group)
        _enter(environment, log)
        super().run()


class _Forks(ForkServerContext):
    """Stands in for vLLM's context of multiprocessing. `log` is the file that this process's output goes to."""

    Process = _Follower
    log: Path


def _lead(arguments: list[str], environment: dict[str, str], log: Path, folder: Path) -> None:
    os.setpgid(0, 0)
    os.chdir(folder)
    _enter(environment, log)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if arguments[0] == "-m":
        sys.path.insert(0, str(folder))
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _enter(environment: dict[str, str], log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    gc.freeze()  # vLLM collects many times, which would search what was imported: half of what a small engine takes
    gc.unfreeze = lambda: None
    if "OMP_NUM_THREADS" in environment:  # a new process reads it while it imports torch
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    forkserver._forkserver.ensure_running = lambda: None  # it is, and started this process
    server.ChildGroup = _Server
    _Forks.log = log
    for name in _STARTING:
        importlib.import_module(name).get_mp_context = _Forks
