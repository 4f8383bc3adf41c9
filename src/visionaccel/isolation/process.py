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
from collections.abc import Mapping
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

_T = TypeVar("_T", messages.Opened, messages.Places)

_MODULE = "visionaccel.isolation.child"
_SLICE = 0.5
_LINGERING = 1.0
_REAPING = 3.0
_UNFINISHED = 5
_SLOW_OPENING = "Set VISIONACCEL_OPEN_DEADLINE if it needs longer, such as to compile."
_DOCTOR = "Run `visionaccel doctor`; the kernel's log (dmesg) may say more of the device."
_SLOW = "Set VISIONACCEL_DEADLINE if the device needs longer."
_FALLBACK = "It is started again in the background; set VISIONACCEL_FALLBACK to let another backend take over."


class _NoAnswerError(Exception):
    """The child did not answer in time, died, hung up, or sent something else. It has been killed in each case."""

    def __init__(self, *, late: bool = False) -> None:
        super().__init__()
        self.late = late


class DeviceProcess:
    """A child process with a session. The thread that makes one must call `reap`, and must not end before.

    The kernel ends the child with the thread that started it (see `child`), so a short-lived thread would take it away.

    Attributes:
        pid: The child's process id, and that of its group.
        dead: Set once it has been reaped and what it said has been read.
    """

    def __init__(self, backend: str, request: messages.PackedRequest) -> None:
        self._what = f"the process of backend {backend!r}"
        self._exchange = threading.Lock()
        self.dead = threading.Event()
        with ExitStack() as ours, ExitStack() as theirs:
            # The request is read from memory: sending it would block for good if the child hung before reading.
            self._inputs = SharedArrays.create("visionaccel-inputs", pickle.dumps(_parent_state()) + request.data)
            ours.callback(self._inputs.close)
            self._outputs = SharedArrays.create("visionaccel-outputs")
            ours.callback(self._outputs.close)
            near, far = socket.socketpair()
            # An answer that is begun and not ended must not be waited for without end.
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
                guarded=False,  # it ends with this process, and `reap` ends what it started
            )
            self.pid = self._child.pid
            ours.pop_all()

    def opened(self, seconds: float) -> Capabilities:
        """Wait for the session to be open; called once, by the thread that reaps. If it fails, the child is reaped.

        Raises:
            VisionAccelError: What the backend raised.
            DeviceLostError: If the child died, or took longer and was killed.
        """
        try:
            with self._exchange:
                return self._answer(messages.Opened, seconds).capabilities
        except BaseException as error:
            self.kill()
            self.reap()
            if isinstance(error, _NoAnswerError):
                late = f"did not open the program within {seconds:g} s"
                raise self._lost(error, late, _SLOW_OPENING, _DOCTOR) from None
            raise

    def run(self, inputs: Mapping[str, Array], seconds: float) -> dict[str, NDArray[Any]]:
        """Run the session once. The inputs are read only and not kept; the outputs are fresh arrays of the caller's.

        Raises:
            VisionAccelError: What the session raised; the child lives on.
            DeviceLostError: If the child died, or took longer and was killed.
        """
        with self._exchange:
            if self.dead.is_set():  # What `reap` then closes is no longer this call's to use.
                raise DeviceLostError(self.fate(), hint=_FALLBACK)
            parts, started = call_parts(), time.monotonic()
            call = messages.encoded(messages.Places(self._inputs.write(inputs)))
            if parts is not None:
                parts.transfer_in += time.monotonic() - started
            try:
                with suppress(OSError):  # If the child is dead, there is no answer either.
                    self._connection.send_bytes(call)
                answer = self._answer(messages.Places, seconds)
            except _NoAnswerError as error:
                if not error.late:
                    self.dead.wait(_REAPING)
                raise self._lost(error, f"did not answer within {seconds:g} s", _SLOW, _FALLBACK) from None
            try:
                started = time.monotonic()
                outputs = self._outputs.copies(answer.arrays)
                if parts is not None:
                    parts.transfer_out += answer.writing_seconds + time.monotonic() - started
                return outputs
            except BaseException:
                self.kill()  # What it sent makes no sense.
                raise

    def exited(self) -> bool:
        """Whether the child is dead, or has been killed and will be."""
        return self._child.exited()

    def kill(self) -> None:
        """End the child and what it started, at once; a call in progress raises DeviceLostError."""
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
        """Wait for a child that was asked to end, and kill it when that is some seconds ago."""
        if not self.exited() and not self.dead.wait(max(0.0, since + seconds - time.monotonic())):
            logger.warning("%s did not close within %g s and was killed.", self._what, seconds)
        self.kill()

    def reap(self) -> None:
        """Wait for the child to die, end what it started, and give back everything that was its."""
        self._child.reap()
        self._output.close()
        self.dead.set()
        with self._exchange:  # A call that was in flight still uses them, until it sees the end.
            self._connection.close()
            self._inputs.close()
            self._outputs.close()

    def fate(self) -> str:
        """How the child ended, and its last words."""
        status = self._child.status
        ended = "hung up" if status is None else how_it_ended(status)
        return f"{self._what} {ended}.{self._last_words()}"

    def _answer(self, kind: type[_T], seconds: float) -> _T:
        """The next answer. Without one the child is killed, as a later call must never take this one's answer.

        Raises:
            VisionAccelError: If that is the answer.
            _NoAnswerError: If there is none of that kind in time.
        """
        limit = time.monotonic() + seconds
        try:
            # In slices, because a process that the child forked may hold the socket open after the child's death.
            while not self._connection.poll(max(0.0, min(limit - time.monotonic(), _SLICE))):
                if self.exited() and not self._connection.poll(0):
                    raise EOFError
                if time.monotonic() >= limit:
                    raise _NoAnswerError(late=True)
            answer = messages.decoded(self._connection.recv_bytes(messages.MOST_BYTES))
            if not isinstance(answer, (kind, messages.Failure)):
                raise ValueError(f"it is not of the kind {kind.__name__}")
        except (EOFError, ConnectionError):
            self._child.exits_within(_LINGERING)  # Its status tells what it is dying of.
            self.kill()
            raise _NoAnswerError from None
        except (ValueError, OSError) as broken:  # OSError: it is too long, or does not end
            logger.error("%s was ended, because it sent an invalid answer: %s", self._what, broken)
            self.kill()
            raise _NoAnswerError from broken
        except BaseException:
            self.kill()
            raise
        if isinstance(answer, messages.Failure):
            raise messages.restored(answer)
        return answer

    def _lost(self, error: _NoAnswerError, late: str, slow: str, hint: str) -> DeviceLostError:
        """The error of a child that did not answer, with what to do if it needs longer."""
        if not error.late:
            return DeviceLostError(self.fate(), hint=hint)
        text = f"{self._what} {late}; its process was ended.{self._last_words()}"
        return DeviceLostError(text, hint=f"{slow} {hint}")

    def _last_words(self) -> str:
        lines = self._output.tail()
        return "" if not lines else "\nIts last output:\n" + "\n".join(f"  {line}" for line in lines) + "\n"


def _parent_state() -> messages.ParentState:
    levels = (logging.getLogger(name).getEffectiveLevel() for name in (None, "visionaccel"))
    return messages.ParentState(tuple(_search_path()), os.environ.get("PYTHONPATH"), min(levels))


def _search_path() -> list[str]:
    """Where this process looks for modules, also what was put there while it ran."""
    return [os.path.abspath(folder) for folder in sys.path]  # noqa: PTH100 - "" is the current folder
