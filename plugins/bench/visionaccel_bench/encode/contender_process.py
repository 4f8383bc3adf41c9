"""The measuring side of one contender's process."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Self

from visionaccel.core.child_groups import ChildGroup, how_it_ended
from visionaccel.core.cores import process_cores
from visionaccel.errors import DeadlineError, DeviceError
from visionaccel_bench.encode.contenders import BUNDLE, Contender
from visionaccel_bench.server import log_end, quiet_environment

_MAIN = "visionaccel_bench.encode.contender_main"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_GRACE = 2.0
"""Seconds that a process has to end by itself after it was closed."""


class ContenderProcess:
    """A process for one contender, or for what measures the machine; it is idle between requests.

    Args:
        log: File that its output goes to.
        threads: Cores that it may run on, if those are fewer than the machine's, and threads of its pools.
        python: Its interpreter; None for this one.

    Attributes:
        started: When it was started, by the system's monotonic clock.
        alive: Whether it takes requests.
    """

    def __init__(self, log: Path, threads: int, python: str | None = None) -> None:
        self._log, self._killed = log, False
        self._connection, theirs = Pipe()
        own = {"VLLM_PLUGINS": "", "TMPDIR": str(log.parent)}  # what it leaves is removed with the run's folder
        environment = quiet_environment(dict.fromkeys(_THREADS, str(threads)) | own)
        self.started = time.monotonic()
        self.alive = True
        with theirs, log.open("wb") as out:
            try:
                self._child = ChildGroup(
                    [python or sys.executable, "-m", _MAIN, str(os.getpid()), str(theirs.fileno())],
                    environment=environment,
                    output=out,
                    pass_fds=(theirs.fileno(),),
                )
            except OSError as error:
                raise DeviceError(f"{python} cannot be started: {error}.", hint="Check the interpreter.") from error
            if threads < len(process_cores()):
                # Some runtimes count cores and not the variables; the process's threads inherit this.
                with suppress(OSError):
                    os.sched_setaffinity(self._child.pid, sorted(process_cores())[:threads])

    def open(self, contender: Contender, source: Path, threads: int, seconds: float) -> dict[str, Any]:
        """Open the contender's tower; returns its `device`, `precision`, `about` and `simulated`. Raises as `ask`."""
        given = asdict(contender)
        given["options"] = {name: value for name, value in given["options"].items() if name not in ("python", BUNDLE)}
        source = contender.bundle or source
        request = {"do": "open", **given, "source": str(source), "threads": threads, "deadline": seconds}
        return self.ask(request, seconds)

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            DeviceError: If it answers that it failed, or dies; it is `alive` only in the first case.
            DeadlineError: If it does not answer in time; it has been ended then.
        """
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            answered = self._connection.poll(seconds)
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes()) if answered else {}
        except (EOFError, OSError) as error:
            self.close()
            raise DeviceError(f"its process {self._ending()}. The end of its output: {log_end(self._log)}") from error
        if not answered:
            self.close()
            raise DeadlineError(f"it took longer than {seconds:g} s and was ended.", hint="Pass a longer --deadline.")
        if "error" in answer:
            raise DeviceError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and the processes that it started."""
        if self.alive:
            self.alive = False
            self._connection.close()
            self._killed = not self._child.end(_GRACE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ending(self) -> str:
        if self._killed:
            return "hung up, lived on, and was ended"
        status = self._child.status
        assert status is not None
        memory = " (the machine may have run out of memory)" if status == -signal.SIGKILL else ""
        return how_it_ended(status) + memory
