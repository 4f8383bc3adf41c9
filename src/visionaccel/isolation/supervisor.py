"""Sessions whose device is used in a child process, and the thread that keeps such a process running."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import Any

from numpy.typing import NDArray

from visionaccel.backends import Capabilities, Session
from visionaccel.core.arrays import Array
from visionaccel.core.cores import cores_here, on_cores
from visionaccel.core.defaults import DEADLINE, LONGEST_SECONDS, OPEN_DEADLINE
from visionaccel.core.program import Program
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import ConfigurationError, DeviceError, DeviceLostError, SettingsError, VisionAccelError
from visionaccel.isolation.messages import OpenRequest, PackedRequest, packed
from visionaccel.isolation.process import DeviceProcess

logger = safe_logger(__name__)

_FALLBACK = "Set VISIONACCEL_FALLBACK to let another backend take over while it is down."
_DYING = 1.0
"""Seconds to wait for a killed process to die, even if the time for closing is over."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds, each above 0 and at most `LONGEST_SECONDS`. Raises SettingsError for other numbers.

    Attributes:
        run: For one call. A process that takes longer is killed.
        opening: For starting a process and opening the program; compilers may take minutes.
        closing: For closing the session before its process is killed.
        first_delay: Before the second restart in a row without a successful call. The first restart has no delay, and
            each further one doubles the delay.
        longest_delay: The longest delay.
    """

    run: float = DEADLINE
    opening: float = OPEN_DEADLINE
    closing: float = 5.0
    first_delay: float = 1.0
    longest_delay: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            seconds = getattr(self, field.name)
            if not 0 < seconds <= LONGEST_SECONDS:  # not the other way round, which NaN would pass
                raise SettingsError(
                    f"{seconds} is not a valid time limit for {field.name!r}.",
                    hint=f"Set a number of seconds above 0 and at most {LONGEST_SECONDS:.0f}.",
                )

    def delay(self, failures: int) -> float:
        """Return the delay before the next start after that many deaths or failed starts without a successful call."""
        if failures <= 1:
            return 0.0
        return min(self.first_delay * 2.0 ** min(failures - 2, 64), self.longest_delay)


class IsolatedSession(Session):
    """Runs a program in a child process. If the process crashes, hangs or is killed, only the call in progress fails.

    A new process is then started in the background. If it is lost too before a call succeeds, the next one is started
    after a delay, which doubles with each further loss. While a process is starting, calls wait for it until the time
    of one call has passed since its start. During a delay calls fail immediately, so that a fallback can take over.

    The child finds the backend by its entry point. The backend must have accepted the program, and the options must be
    valid. The capabilities are those of the child's session, but never thread-safe or with tensors.

    Raises:
        VisionAccelError: What the backend raised when it opened the program, with the same type.
        DeviceLostError: If the process died or hung while it opened the program; no process is left.
        ConfigurationError: If the program cannot be sent to a child process, or no child can be started.
    """

    def __init__(
        self,
        backend: str,
        program: Program,
        device: str | None,
        options: Mapping[str, Any],
        *,
        limits: Limits | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise ConfigurationError(
                "devices run in child processes only on Linux.", hint="Set VISIONACCEL_ISOLATION=none."
            )
        try:
            request = packed(OpenRequest(backend, program, device, dict(options)))
        except VisionAccelError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"program {program.name!r} cannot be sent to another process: {type(error).__name__}: {error}",
                hint="Set VISIONACCEL_ISOLATION=none.",
            ) from error
        self._supervisor = _Supervisor(backend, request, limits or Limits())
        self.capabilities = self._supervisor.start()
        # A session that is dropped, or still open when the program ends, must not keep the device.
        self._finalizer = weakref.finalize(self, self._supervisor.close)

    @property
    def pid(self) -> int | None:
        """Process id of the child that takes calls; None while no child runs."""
        process = self._supervisor.process
        return None if process is None else process.pid

    @property
    def restarts(self) -> int:
        """How often a lost child was replaced."""
        return self._supervisor.restarts

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the program once in the child, on copies of the inputs. The outputs are new numpy arrays.

        Raises:
            VisionAccelError: What the session raised; a DeviceError for other exceptions. The child continues.
            DeviceLostError: If no child runs, or it died, sent an invalid answer, or took too long and was killed.
        """
        return self._supervisor.run(inputs)

    def end_calls(self) -> bool:
        """Kill the child if a call is in progress, which then raises DeviceLostError. A new child is started."""
        return self._supervisor.end_call()

    def begin_close(self) -> None:
        """Ask the child to end, or kill it if a call is in progress, which then raises DeviceLostError."""
        self._supervisor.begin_close()

    def close(self) -> None:
        """End the child as `begin_close` does, and wait until it has ended."""
        self._finalizer()


class _Supervisor:
    """Runs one process at a time. Restarts it when it dies, after a delay that grows while no call succeeds.

    The thread that starts the processes outlives them, because the kernel ends them with it. It is a daemon, so a
    program that forgets to close can end, and the device's process ends with it. The thread runs on the cores of the
    thread that makes this object, and the processes inherit them.
    """

    def __init__(self, backend: str, request: PackedRequest, limits: Limits) -> None:
        self._backend, self._request, self._limits = backend, request, limits
        self._cores = cores_here()
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._closing_since: float | None = None
        self.process: DeviceProcess | None = None
        self._starting: DeviceProcess | None = None
        self._start_began = time.monotonic()
        self._next_start: float | None = None
        self._failures = self._waits_ended = 0
        self._reason = ""
        self.restarts = 0
        self._first: Future[Capabilities] = Future()
        self._thread = threading.Thread(target=self._keep_running, name="visionaccel-supervisor", daemon=True)

    def start(self) -> Capabilities:
        """Start the first process and wait until its session is open. Raises what `DeviceProcess.opened` raises."""
        self._thread.start()
        try:
            return self._first.result()
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
        if os.getpid() != self._owner:
            raise DeviceError("the device was opened by a different process.", hint="Open it after the fork.")
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
        """End the call in progress and return whether there was one.

        Kills its process, or ends its wait for a process that is starting.
        """
        if not self._turn.locked():
            return False
        with self._changed:
            process = self.process
            if process is None:
                self._waits_ended += 1
                self._changed.notify_all()
        if process is not None:
            process.kill()
        return True

    def begin_close(self) -> None:
        """Ask the process to end, or kill it if it is busy or starting. Does not wait."""
        if os.getpid() != self._owner:
            return  # a fork has a copy of this object, but the processes belong to the parent
        with self._changed:
            if self._closed:
                return
            self._closing_since = time.monotonic()
            self._changed.notify_all()
            process, starting = self.process, self._starting
        if starting is not None:
            starting.kill()
        if process is not None:
            process.begin_end()

    def close(self) -> None:
        """End the process and the thread.

        Takes at most the time for closing since `begin_close`, and as long again until a killed process is dead.
        """
        self.begin_close()
        process, since = self.process, self._closing_since
        if since is None or os.getpid() != self._owner:  # the process may have forked since `begin_close`
            return
        if self._thread is threading.current_thread():  # garbage collection runs here, and this thread must reap
            if process is not None:
                process.kill()
            return
        if process is not None:
            process.end(self._limits.closing, since)
        self._thread.join(max(_DYING, since + 2 * self._limits.closing - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("The process of backend %r was killed but has not ended.", self._backend)

    @property
    def _closed(self) -> bool:
        return self._closing_since is not None

    def _ready(self) -> DeviceProcess:
        """Return the process that takes calls. Waits for a start until the time of one call has passed since it began.

        Raises:
            DeviceLostError: If it is not ready by then, a restart is delayed, or `end_call` ends the wait.
            DeviceError: If this is closed.
        """
        with self._changed:
            ended = self._waits_ended
            while True:
                if self._closed:
                    raise DeviceError("the encoder is closed.", hint="Open a new one.")
                if self.process is not None and self.process.exited():
                    self._retire(self.process)
                if self.process is not None:
                    return self.process
                now = time.monotonic()
                if self._next_start is not None:
                    raise DeviceLostError(
                        f"the process of backend {self._backend!r} was lost {self._failures} times in a row and "
                        f"restarts in {max(0.0, self._next_start - now):.1f} s. {self._reason}",
                        hint=_FALLBACK,
                    )
                left = self._start_began + self._limits.run - now
                if left <= 0 or self._waits_ended != ended:
                    raise DeviceLostError(
                        f"the process of backend {self._backend!r} has been starting for {now - self._start_began:.0f} "
                        f"s and is not ready. {self._reason}",
                        hint=_FALLBACK,
                    )
                self._changed.wait(left)

    def _retire(self, process: DeviceProcess) -> None:
        """Stop using a process that is dead or has been killed."""
        with self._changed:
            if self.process is process:
                self.process = None
                self._start_began = time.monotonic()

    def _keep_running(self) -> None:
        """Start a process, wait for its end and start the next, until this is closed or the first start fails."""
        with on_cores(self._cores):
            while self._delay_is_over():
                try:
                    process = self._open()
                except BaseException as error:
                    if not self._first.done():
                        self._first.set_exception(error)
                        return
                    reason = error.message if isinstance(error, VisionAccelError) else f"{error}"
                else:
                    process.reap()
                    self._retire(process)
                    reason = process.fate()
                if not self._closed:
                    self._failed(reason)

    def _delay_is_over(self) -> bool:
        """Wait until the next process may be started; return False if this is closed."""
        with self._changed:
            delay = self._limits.delay(self._failures)
            if delay:
                self._next_start = time.monotonic() + delay
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed, delay)
                self._next_start = None
            self._start_began = time.monotonic()
            return not self._closed

    def _open(self) -> DeviceProcess:
        """Start a process, which takes calls once its session is open. Leaves no process behind on an error."""
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
        found = replace(found, thread_safe=False, max_in_flight=1, takes_tensors=False)
        again = self._first.done()
        if again and found != self._first.result():
            process.kill()
            process.reap()
            raise DeviceError(f"after a restart, the device is {found}; before, it was {self._first.result()}.")
        with self._changed:
            self.restarts += again  # before a waiting call can receive its answer
            self.process = process
            if self._closed:
                process.kill()
            self._changed.notify_all()
        if again:
            logger.info("The process of backend %r was restarted as process %d.", self._backend, process.pid)
        else:
            self._first.set_result(found)
        return process

    def _failed(self, reason: str) -> None:
        with self._changed:
            self._failures += 1
            self._reason = reason.partition("\n")[0]  # the rest is the child's last output, which is logged below
            delay = self._limits.delay(self._failures)
        when = f"in {delay:.1f} s" if delay else "now"
        logger.error("Backend %r restarts %s: %s", self._backend, when, reason.rstrip())
