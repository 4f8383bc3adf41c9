"""Keeps a device's process running: one thread starts each, waits for its death, and starts the next."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from visionaccel.backends import Capabilities
from visionaccel.core.arrays import Array
from visionaccel.core.cores import cores_here, on_cores
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import ConfigurationError, DeviceError, DeviceLostError, VisionAccelError
from visionaccel.isolation.limits import Limits
from visionaccel.isolation.process import DeviceProcess
from visionaccel.isolation.request import PackedRequest

logger = safe_logger(__name__)

_FALLBACK = "Set VISIONACCEL_FALLBACK to let another backend take over meanwhile."
_LONGEST_WAIT = 3600.0


class Supervisor:
    """One process at a time, started anew whenever it dies, after a delay that grows while no call succeeds.

    The thread that starts the processes lives until the last of them is dead, as the kernel ends them with it; it is a
    daemon, so that a program which forgets to close can end, and the device's process with it. It runs on the cores of
    the thread that makes it, and the processes inherit them.

    Args:
        backend: The backend's name.
        request: What to open, packed.
        limits: Times.

    Attributes:
        restarts: Processes started so far after the first.
    """

    def __init__(self, backend: str, request: PackedRequest, limits: Limits) -> None:
        self._backend, self._request, self._limits = backend, request, limits
        self._cores = cores_here()
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._closed = False
        self._process: DeviceProcess | None = None
        self._starting: DeviceProcess | None = None
        self._start_began = time.monotonic()
        self._next_start: float | None = None
        self._failures = self._waits_ended = 0
        self._reason = ""
        self.restarts = 0
        self._first: Future[Capabilities] = Future()
        self._thread = threading.Thread(target=self._supervise, name="visionaccel-supervisor", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the child that takes calls; None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> Capabilities:
        """Start the first process and wait until its session is open.

        Raises:
            VisionAccelError: What the backend raised; nothing is left running.
            DeviceLostError: If the process died or took too long.
        """
        self._thread.start()
        try:
            return self._first.result()
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
        """One call, as `IsolatedSession.run`."""
        if os.getpid() != self._owner:
            raise DeviceError("the device was opened by another process.", hint="Open it after the fork.")
        with self._turn:
            process = self._ready()
            try:
                outputs = process.run(inputs, self._limits.run)
            except BaseException as error:
                if isinstance(error, DeviceLostError) or process.exited():
                    self._retire(process)
                if self._closed and isinstance(error, DeviceLostError):
                    raise DeviceLostError("the encoder was closed during the call.", hint="Open a new one.") from error
                raise
            with self._changed:
                self._failures = 0
            return outputs

    def end_call(self) -> bool:
        """End the call in progress, if there is one; whether there is.

        Its process is ended and the next is started, or the call waits no longer for one that is starting.
        """
        if not self._turn.locked():
            return False
        with self._changed:
            process = self._process
            if process is None:
                self._waits_ended += 1
                self._changed.notify_all()
        if process is not None:
            process.kill()
        return True

    def close(self) -> None:
        """End the process, politely unless it is busy, and the thread.

        Takes at most the time for closing, and as long again until a killed process is gone.
        """
        if os.getpid() != self._owner:
            return  # A fork got a copy of this object, and no process of its own.
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            process, starting = self._process, self._starting
        if starting is not None:
            starting.kill()
        if self._thread is threading.current_thread():  # Garbage was collected here; nobody else could reap.
            if process is not None:
                process.kill()
            return
        if process is not None:
            process.end(self._limits.closing)
        self._thread.join(self._limits.closing)
        if self._thread.is_alive():
            logger.warning("The process of backend %r was killed but does not end.", self._backend)

    def _ready(self) -> DeviceProcess:
        """The process that takes calls; waits for a restart until the time of one call has passed since it began.

        Raises:
            DeviceLostError: If there is none yet, not before a delay has passed, or `end_call` ends the wait.
            DeviceError: If it is closed.
        """
        with self._changed:
            ended = self._waits_ended
            while True:
                if self._closed:
                    raise DeviceError("the encoder is closed.", hint="Open a new one.")
                if self._process is not None and self._process.exited():
                    self._retire(self._process)
                if self._process is not None:
                    return self._process
                now = time.monotonic()
                if self._next_start is not None:
                    raise DeviceLostError(
                        f"the process of backend {self._backend!r} was lost {self._failures} times in a row and is "
                        f"started again in {max(0.0, self._next_start - now):.1f} s. {self._reason}",
                        hint=_FALLBACK,
                    )
                left = self._start_began + self._limits.run - now
                if left <= 0 or self._waits_ended != ended:
                    raise DeviceLostError(
                        f"the process of backend {self._backend!r} has been starting for {now - self._start_began:.0f} "
                        f"s and is not ready. {self._reason}",
                        hint=_FALLBACK,
                    )
                self._changed.wait(min(left, _LONGEST_WAIT))

    def _retire(self, process: DeviceProcess) -> None:
        """Give a process no more calls: it is dead, or has been killed."""
        with self._changed:
            if self._process is process:
                self._process = None
                self._start_began = time.monotonic()

    def _supervise(self) -> None:
        with on_cores(self._cores):
            self._keep_running()

    def _keep_running(self) -> None:
        try:
            process, capabilities = self._open()
        except BaseException as error:
            self._first.set_exception(error)
            return
        self._publish(process)
        self._first.set_result(capabilities)
        while True:
            process.reap()
            self._retire(process)
            if self._closed:
                return
            self._failed(process.fate())
            again = self._restart(capabilities)
            if again is None:
                return
            process = again

    def _restart(self, capabilities: Capabilities) -> DeviceProcess | None:
        """The next process, after as many attempts as it takes; None if closed meanwhile."""
        while True:
            delay = self._limits.delay(self._failures)
            with self._changed:
                if delay:
                    self._next_start = time.monotonic() + delay
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed, delay)
                self._next_start = None
                self._start_began = time.monotonic()
                if self._closed:
                    return None
            try:
                process, found = self._open()
                if found != capabilities:
                    process.kill()
                    process.reap()
                    raise DeviceError(f"the device came back as {found}; it was {capabilities}.")
            except Exception as error:
                if self._closed:
                    return None
                self._failed(error.message if isinstance(error, VisionAccelError) else f"{error}")
                continue
            self._publish(process, again=True)
            logger.info("The process of backend %r runs again, as %d.", self._backend, process.pid)
            return process

    def _open(self) -> tuple[DeviceProcess, Capabilities]:
        """A process with an open session.

        Raises:
            VisionAccelError: If there is none; nothing is left of it then.
        """
        try:
            process = DeviceProcess(self._backend, self._request)
        except OSError as error:
            raise ConfigurationError(
                f"no process can be started for backend {self._backend!r}: {error}",
                hint="Set VISIONACCEL_ISOLATION=none.",
            ) from error
        with self._changed:
            self._starting = process
            if self._closed:
                process.kill()
        try:
            found = process.opened(self._limits.opening)
        finally:
            with self._changed:
                self._starting = None
        return process, replace(found, thread_safe=False, max_in_flight=1, takes_tensors=False)

    def _publish(self, process: DeviceProcess, *, again: bool = False) -> None:
        with self._changed:
            self.restarts += again  # before a call that waits can be answered by it
            self._process = process
            if self._closed:
                process.kill()
            self._changed.notify_all()

    def _failed(self, reason: str) -> None:
        with self._changed:
            self._failures += 1
            self._reason = reason.partition("\n")[0]  # The rest is the child's last output, which the log has.
            delay = self._limits.delay(self._failures)
        soon = f"in {delay:.1f} s" if delay else "at once"
        logger.error("Backend %r is started again %s, because %s", self._backend, soon, reason.rstrip())
