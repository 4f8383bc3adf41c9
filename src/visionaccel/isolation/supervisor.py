"""Keeps a device's process running: one thread starts each, waits for its death, and starts the next."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import Any

from numpy.typing import NDArray

from visionaccel.backends import Capabilities
from visionaccel.core.arrays import Array
from visionaccel.core.cores import cores_here, on_cores
from visionaccel.core.defaults import DEADLINE, LONGEST_SECONDS, OPEN_DEADLINE
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import ConfigurationError, DeviceError, DeviceLostError, SettingsError, VisionAccelError
from visionaccel.isolation.messages import PackedRequest
from visionaccel.isolation.process import DeviceProcess

logger = safe_logger(__name__)

_FALLBACK = "Set VISIONACCEL_FALLBACK to let another backend take over while it is down."
_DYING = 1.0
"""Seconds that a killed process has to be gone, even where the time for closing is over."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds, each above 0 and at most `LONGEST_SECONDS`.

    Attributes:
        run: For one call. A process that does not answer by then is killed.
        opening: For starting a process and opening the program; compilers may take minutes.
        closing: For the session to close before its process is killed.
        first_delay: Before the second restart in a row without a successful call between. The first has no delay; each
            further one doubles it.
        longest_delay: The most that the delay grows to.

    Raises:
        SettingsError: If one is not such a number.
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
                    f"{seconds} is not a time limit for {field.name!r}.",
                    hint=f"Give a number of seconds above 0 and at most {LONGEST_SECONDS:.0f}.",
                )

    def delay(self, failures: int) -> float:
        """The delay before the next start, after that many deaths or failed starts without a successful call."""
        if failures <= 1:
            return 0.0
        return min(self.first_delay * 2.0 ** min(failures - 2, 64), self.longest_delay)


class Supervisor:
    """One process at a time, restarted whenever it dies, after a delay that grows while no call succeeds.

    The thread that starts the processes lives until the last of them is dead, as the kernel ends them with it; it is a
    daemon, so that a program which forgets to close can end, and the device's process with it. It runs on the cores of
    the thread that makes it, and the processes inherit them.

    Attributes:
        restarts: Processes started so far after the first.
    """

    def __init__(self, backend: str, request: PackedRequest, limits: Limits) -> None:
        self._backend, self._request, self._limits = backend, request, limits
        self._cores = cores_here()
        self._owner = os.getpid()
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._closing_since: float | None = None
        self._process: DeviceProcess | None = None
        self._starting: DeviceProcess | None = None
        self._start_began = time.monotonic()
        self._next_start: float | None = None
        self._failures = self._waits_ended = 0
        self._reason = ""
        self.restarts = 0
        self._first: Future[Capabilities] = Future()
        self._thread = threading.Thread(target=self._keep_running, name="visionaccel-supervisor", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the child that takes calls; None while there is none."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> Capabilities:
        """Start the first process and wait until its session is open; errors as `DeviceProcess.opened`."""
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

    def begin_close(self) -> None:
        """Have the process end, at once if it is busy or starting, without waiting for that."""
        if os.getpid() != self._owner:
            return  # A fork has a copy of this object, but its processes belong to the parent.
        with self._changed:
            if self._closed:
                return
            self._closing_since = time.monotonic()
            self._changed.notify_all()
            process, starting = self._process, self._starting
        if starting is not None:
            starting.kill()
        if process is not None:
            process.begin_end()

    def close(self) -> None:
        """End the process and the thread.

        Takes at most the time for closing since `begin_close`, and as long again until a killed process is gone.
        """
        self.begin_close()
        process, since = self._process, self._closing_since
        if since is None or os.getpid() != self._owner:  # A fork may have been made since `begin_close`.
            return
        if self._thread is threading.current_thread():  # Garbage was collected here, and this thread must reap.
            if process is not None:
                process.kill()
            return
        if process is not None:
            process.end(self._limits.closing, since)
        self._thread.join(max(_DYING, since + 2 * self._limits.closing - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("The process of backend %r was killed but does not end.", self._backend)

    @property
    def _closed(self) -> bool:
        return self._closing_since is not None

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
                self._changed.wait(left)

    def _retire(self, process: DeviceProcess) -> None:
        """Give a process no more calls: it is dead, or has been killed."""
        with self._changed:
            if self._process is process:
                self._process = None
                self._start_began = time.monotonic()

    def _keep_running(self) -> None:
        """Start a process, wait for its end and start the next one, until closed or the first cannot be opened."""
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
        """Wait until the next process may be started; False if it must not be, as this is closed."""
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
        """Start a process and give it the calls once its session is open; if it fails, nothing is left of it."""
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
            raise DeviceError(f"the device came back as {found}; it was {self._first.result()}.")
        with self._changed:
            self.restarts += again  # before a call that waits can be answered by it
            self._process = process
            if self._closed:
                process.kill()
            self._changed.notify_all()
        if again:
            logger.info("The process of backend %r runs again, as %d.", self._backend, process.pid)
        else:
            self._first.set_result(found)
        return process

    def _failed(self, reason: str) -> None:
        with self._changed:
            self._failures += 1
            self._reason = reason.partition("\n")[0]  # The rest is the child's last output, which the log has.
            delay = self._limits.delay(self._failures)
        soon = f"in {delay:.1f} s" if delay else "at once"
        logger.error("Backend %r is started again %s, because %s", self._backend, soon, reason.rstrip())
