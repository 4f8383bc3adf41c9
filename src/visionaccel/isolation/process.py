"""The parent's side of one child process, from its start to its end."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from numpy.typing import NDArray

from visionaccel.backends import Capabilities, call_parts
from visionaccel.core.arrays import Array
from visionaccel.core.child_groups import ChildGroup, how_it_ended
from visionaccel.core.cores import child_environment
from visionaccel.core.safe_text import safe_logger
from visionaccel.errors import DeviceLostError
from visionaccel.isolation import messages
from visionaccel.isolation.log_records import OutputReader
from visionaccel.isolation.shared_arrays import SharedArrays

logger = safe_logger(__name__)

_Kind = TypeVar("_Kind", messages.Opened, messages.Places)
_Result = TypeVar("_Result")

_MODULE = "visionaccel.isolation.child"
_SLICE = 0.5
_LINGERING = 1.0
_REAPING = 3.0
_UNFINISHED = 5
_SLOW_OPENING = "Set VISIONACCEL_OPEN_DEADLINE if it needs longer, such as to compile."
_DOCTOR = "Run `visionaccel doctor`; the kernel's log (dmesg) may say more about the device."
_SLOW = "Set VISIONACCEL_DEADLINE if the device needs longer."
_FALLBACK = "It is restarted in the background; set VISIONACCEL_FALLBACK to let another backend take over."


class _NoAnswerError(Exception):
    """The child died, hung up or sent something invalid, or did not answer in time (`late`). It has been killed."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late


class DeviceProcess:
    """A child process with a session. The thread that makes it must call `reap` and outlive the child.

    The kernel ends the child with the thread that started it (see `end_with_parent`).

    Attributes:
        pid: The process id of the child and of its group.
        dead: Set once the child has been reaped and its output has been read.
    """

    def __init__(self, backend: str, request: messages.PackedRequest) -> None:
        self._what = f"the process of backend {backend!r}"
        self._exchange = threading.Lock()
        self.dead = threading.Event()
        with ExitStack() as ours, ExitStack() as theirs:
            # The child reads the request from memory: sending it would never return if the child hung before reading.
            levels = (logging.getLogger(name).getEffectiveLevel() for name in (None, "visionaccel"))
            state = messages.ParentState(tuple(_search_path()), os.environ.get("PYTHONPATH"), min(levels))
            self._inputs = SharedArrays.create("visionaccel-inputs", pickle.dumps(state) + request.data)
            ours.callback(self._inputs.close)
            self._outputs = SharedArrays.create("visionaccel-outputs")
            ours.callback(self._outputs.close)
            near, far = socket.socketpair()
            # Do not wait without a limit for an answer that the child starts to send and does not finish.
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _UNFINISHED, 0))
            theirs.callback(far.close)
            self._connection = Connection(near.detach())
            ours.callback(self._connection.close)
            (printed, prints), (records, logs) = os.pipe(), os.pipe()
            theirs.callback(os.close, prints)
            theirs.callback(os.close, logs)
            self._output = OutputReader(backend, printed, records)
            ours.callback(self._output.close)
            pipes = (far.fileno(), self._inputs.fd, self._outputs.fd, logs)
            pass_fds = (*pipes, *(file.fd for file in request.files))
            path = os.pathsep.join(folder for folder in _search_path() if os.pathsep not in folder)
            self._child = ChildGroup(
                [sys.executable, "-P", "-u", "-m", _MODULE, str(os.getpid()), *map(str, pipes)],
                environment={**child_environment(), "PYTHONPATH": path},
                output=prints,
                pass_fds=pass_fds,
                guarded=False,  # the child ends with this process, and `reap` ends what the child started
            )
            self.pid = self._child.pid
            ours.pop_all()

    def opened(self, seconds: float) -> Capabilities:
        """Wait for the session to open. Called once, by the thread that reaps; reaps the child on an error.

        Raises what `IsolatedSession` raises.
        """
        try:
            with self._exchange:
                return self._answer(messages.Opened, seconds, lambda opened: opened.capabilities)
        except BaseException as error:
            self.kill()
            self.reap()
            if isinstance(error, _NoAnswerError):
                late = f"did not open the program within {seconds:g} s"
                raise self._lost(error, late, _SLOW_OPENING, _DOCTOR) from None
            raise

    def run(self, inputs: Mapping[str, Array], seconds: float) -> dict[str, NDArray[Any]]:
        """Run the session once. Raises what `IsolatedSession.run` raises."""
        with self._exchange:
            if self.dead.is_set():  # `reap` may have closed what a call needs
                raise DeviceLostError(self.fate(), hint=_FALLBACK)
            parts, started = call_parts(), time.monotonic()
            call = messages.encoded(messages.Places(self._inputs.write(inputs)))
            if parts is not None:
                parts.transfer_in += time.monotonic() - started
            try:
                with suppress(OSError):  # the child is dead, so waiting for its answer fails too
                    self._connection.send_bytes(call)
                return self._answer(messages.Places, seconds, self._copied)
            except _NoAnswerError as error:
                if not error.late:
                    self.dead.wait(_REAPING)
                raise self._lost(error, f"did not answer within {seconds:g} s", _SLOW, _FALLBACK) from None

    def exited(self) -> bool:
        """Return whether the child is dead or has been killed."""
        return self._child.exited()

    def kill(self) -> None:
        """Kill the child and the processes that it started; a call in progress raises DeviceLostError."""
        self._child.kill()

    def begin_end(self) -> None:
        """Ask the child to close its session and end; kill it if a call is in progress."""
        if not self._exchange.acquire(blocking=False):
            self.kill()
            return
        try:
            with suppress(OSError):
                self._connection.send_bytes(b"")
        finally:
            self._exchange.release()

    def end(self, seconds: float, since: float) -> None:
        """Wait for a child that was asked to end at the time `since`, and kill it if that takes more seconds."""
        if not self.exited() and not self.dead.wait(max(0.0, since + seconds - time.monotonic())):
            logger.warning("%s did not close within %g s and was killed.", self._what, seconds)
        self.kill()

    def reap(self) -> None:
        """Wait for the child to die, kill the processes that it started, and release its memory and pipes."""
        self._child.reap()
        self._output.close()
        self.dead.set()
        with self._exchange:  # a call in progress still uses them until it notices the end
            self._connection.close()
            self._inputs.close()
            self._outputs.close()

    def fate(self) -> str:
        """Describe how the child ended, and quote its last output."""
        status = self._child.status
        ended = "hung up" if status is None else how_it_ended(status)
        return f"{self._what} {ended}.{self._last_output()}"

    def _copied(self, answer: messages.Places) -> dict[str, NDArray[Any]]:
        started = time.monotonic()
        outputs = self._outputs.copies(answer.arrays)
        if (parts := call_parts()) is not None:
            parts.transfer_out += answer.writing_seconds + time.monotonic() - started
        return outputs

    def _answer(self, kind: type[_Kind], seconds: float, take: Callable[[_Kind], _Result]) -> _Result:
        """Wait for the next answer and return `take(answer)`. Kills the child if the answer is invalid or late.

        Otherwise a later call could receive this call's answer.

        Raises:
            VisionAccelError: If the answer is an error.
            _NoAnswerError: If no valid answer arrives in time.
        """
        limit = time.monotonic() + seconds
        try:
            # In slices, because a process that the child forked may keep the socket open after the child's death.
            while not self._connection.poll(max(0.0, min(limit - time.monotonic(), _SLICE))):
                if self.exited() and not self._connection.poll(0):
                    raise EOFError
                if time.monotonic() >= limit:
                    raise _NoAnswerError(late=True)
            answer = messages.decoded(self._connection.recv_bytes(messages.MOST_BYTES))
            if isinstance(answer, kind):
                return take(answer)
            if not isinstance(answer, messages.Failure):
                raise ValueError(f"expected {kind.__name__}, received {type(answer).__name__}")
        except (EOFError, ConnectionError):
            self._child.exits_within(_LINGERING)  # Wait, so that its status shows why it died.
            self.kill()
            raise _NoAnswerError from None
        except (ValueError, TypeError, OSError) as broken:  # OSError: it is too long, or incomplete
            logger.error("%s was killed because it sent an invalid answer: %s", self._what, broken)
            self.kill()
            raise _NoAnswerError from broken
        except BaseException:
            self.kill()
            raise
        raise messages.restored(answer)

    def _lost(self, error: _NoAnswerError, late: str, slow: str, hint: str) -> DeviceLostError:
        """Make the error for a child that did not answer; `late` and `slow` are for one that took too long."""
        if not error.late:
            return DeviceLostError(self.fate(), hint=hint)
        text = f"{self._what} {late} and was killed.{self._last_output()}"
        return DeviceLostError(text, hint=f"{slow} {hint}")

    def _last_output(self) -> str:
        lines = self._output.tail()
        return "" if not lines else "\nIts last output:\n" + "\n".join(f"  {line}" for line in lines) + "\n"


def _search_path() -> list[str]:
    """Return this process's `sys.path` in absolute paths."""
    return [os.path.abspath(folder) for folder in sys.path]  # noqa: PTH100 - "" is the current folder
